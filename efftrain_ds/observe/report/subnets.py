"""Searches for a sub-network: all that was evaluated over its cost, the best at each cost, budget and choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...core.pareto import pareto
from . import html
from .figures import INK, MARKERS, SERIES, panel_grid, style, to_svg
from .history import finite
from .run import RunData

RESULT, TABLE = "subnet.json", "evaluated.json"
"""What was chosen, and all that was evaluated: files in the folder of a search."""
_COSTS = ("macs", "params", "latency")
_MOST = 4
"""Searches in one figure."""


@dataclass(frozen=True)
class FoundSubnet:
    """A finished search.

    Attributes:
        name: shown where there are several.
        result: what was chosen, with its costs "macs", "params" and, where it was limited, "latency" (in
            "latency_unit"); "search_top1" and "val_top1" are shares; "limits" by the name of the cost are a number (at
            most) or a pair.
        rows: evaluated sub-networks in order, each with the same costs and "top1".
    """

    name: str
    result: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def column(self, cost: str) -> tuple[np.ndarray, np.ndarray]:
        """(costs, top-1 in percent) [n] of the rows that have both."""
        pairs = [(finite(row.get(cost)), finite(row.get("top1"))) for row in self.rows]
        known = [(x, 100 * y) for x, y in pairs if x is not None and y is not None]
        found = np.array(known, dtype=np.float64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def limit(self, cost: str) -> tuple[float, float] | None:
        """(least, most) that was allowed, None where there was no limit."""
        limits = self.result.get("limits")
        value = limits.get(cost) if isinstance(limits, dict) else None
        pair = value if isinstance(value, (list, tuple)) and len(value) == 2 else [0, value]
        low, high = finite(pair[0]), finite(pair[1])
        return None if low is None or high is None else (low, high)


def read_found(folder: Path) -> tuple[list[FoundSubnet], list[str]]:
    """Searches in the folders below a run's, by name, and what could not be read, in words."""
    found, notes = [], []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            rows = json.loads(path.with_name(TABLE).read_text(encoding="utf-8"))
            if not isinstance(result, dict) or not isinstance(rows, list):
                raise ValueError("not what a search writes")
        except (OSError, ValueError) as error:
            notes.append(f"the search in {path.parent.name} could not be read ({error})")
            continue
        found.append(FoundSubnet(path.parent.name, result, [row for row in rows if isinstance(row, dict)]))
    return found, notes


# -- drawing -----------------------------------------------------------------------------------------------------


def pareto_figure(searches: Sequence[FoundSubnet]) -> Any:
    """Top-1 over each cost: MACs, parameters, and latency where it was limited.

    Args:
        searches: at least one; several lie over each other in colours of their own.

    Returns:
        A matplotlib figure.
    """
    searches = searches[:_MOST]
    shown = [cost for cost in _COSTS if cost != "latency" or any(len(s.column(cost)[0]) for s in searches)]
    with style():
        figure, grid = panel_grid(1, len(shown), 4.2, top=0.45, sharey=True)
        for axes, cost in zip(grid[0], shown, strict=True):
            size, label = _unit(searches, cost)
            for number, search in enumerate(searches):
                _draw(axes, search, cost, size, number, len(searches) == 1)
            axes.set_xlabel(label)
            axes.margins(x=0.04)
        grid[0][0].set_ylabel("top-1 (%)")
        _cut(grid[0][0], searches)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="upper left", bbox_to_anchor=(0.045, 1.0), ncols=len(labels))
        return figure


def _draw(axes: Any, search: FoundSubnet, cost: str, size: float, number: int, single: bool) -> None:
    color = SERIES[number % len(SERIES)]
    first = number == 0
    costs, scores = search.column(cost)
    limit = search.limit(cost)
    if limit is not None:
        low, high = limit[0] / size, limit[1] / size
        axes.axvline(high, color=INK if single else color, ls="--", lw=1.1, label="budget" if first else None)
        if low > 0:
            axes.axvspan(low, high, color=INK if single else color, alpha=0.06, lw=0)
            axes.axvline(low, color=INK if single else color, ls="--", lw=1.1)
    axes.plot(
        *(costs / size, scores),
        **{"color": INK, "alpha": 0.28, "marker": "o", "ls": "none", "ms": 3.2, "mew": 0, "zorder": 1},
        label="evaluated" if first else None,
    )
    front = pareto(costs.tolist(), scores.tolist())
    axes.plot(
        *(costs[front] / size, scores[front]),
        **{"color": color, "marker": MARKERS[number % len(MARKERS)], "drawstyle": "steps-post", "zorder": 2},
        label="best at this cost" if single else f" {search.name}",
    )
    at, seen, held = (finite(search.result.get(key)) for key in (cost, "search_top1", "val_top1"))
    color = SERIES[1] if single else color
    how = f" by {search.result['score']}" if single and search.result.get("score") == "loss" else ""
    words = {f"chosen{how}": seen, "chosen, held out": held}
    looks = (
        {"marker": "*", "ms": 14, "mec": "none", "zorder": 4},
        {"marker": "D", "ms": 6.5, "mfc": "none", "mew": 1.6},
    )
    for (text, score), look in zip(words.items(), looks, strict=True):
        if at is not None and score is not None:
            label = f"{text}: {100 * score:.2f} %" if single else text if first else None
            axes.plot([at / size], [100 * score], **{"color": color, "ls": "none", "zorder": 3, **look}, label=label)


def _unit(searches: Sequence[FoundSubnet], cost: str) -> tuple[float, str]:
    """Size of the unit that suits a cost, and what the axis is called."""
    if cost == "latency":
        unit, device = (str(searches[0].result.get(f"latency_{key}") or "") for key in ("unit", "device"))
        return 1.0, f"latency ({unit})" + (f" on {device}" if device else "")
    most = max((float(s.column(cost)[0].max()) for s in searches if len(s.column(cost)[0])), default=0.0)
    size, letter = next(((s, n) for s, n in ((1e9, "G"), (1e6, "M"), (1e3, "K")) if most >= s), (1.0, ""))
    return size, f"{'MACs of one image' if cost == 'macs' else 'parameters'}{f' ({letter})' * bool(letter)}"


def _cut(axes: Any, searches: Sequence[FoundSubnet]) -> None:
    """Leave out the lowest few scores where they would take most of the height."""
    scores = np.concatenate([s.column("macs")[1] for s in searches])
    if len(scores) < 20:
        return
    held = [100 * v for s in searches if (v := finite(s.result.get("val_top1"))) is not None]
    low, high = min(float(np.quantile(scores, 0.05)), *held, np.inf), max(float(scores.max()), *held, -np.inf)
    bottom = low - 0.25 * (high - low)
    if scores.min() < bottom:
        axes.set_ylim(bottom, high + 0.06 * (high - bottom))


# -- in the page -------------------------------------------------------------------------------------------------


def subnets(run: RunData, key: str) -> str:
    """Table of the searches of a run, their picture, and the chosen sub-networks in full."""
    found, notes = read_found(run.folder)
    parts = [html.paragraph(note, "soft") for note in notes]
    if found:
        timed = any(finite(s.result.get("latency")) is not None for s in found)
        head = ["search", "budget", "algorithm", "evaluated", "of step", "MACs", "parameters"]
        head += ["latency"] if timed else []
        head += ["top\u20111 in the search, %", "held out, %"]
        rows = [[*_facts(s), *([_cost(s.result, "latency")] if timed else []), *_scores(s)] for s in found]
        svg = to_svg(pareto_figure(found), f"{key}-subnets", "top-1 over MACs and parameters of evaluated sub-networks")
        caption = "Top-1 on the images of the search; the rhombus is the chosen one on the held-out split."
        if len(found) > _MOST:
            caption += f" The first {_MOST} searches."
        parts += [html.table(head, rows, left=(0, 1, 2)), html.figure(svg, caption)]
        for search in found:
            text = json.dumps(search.result.get("config"), indent=1)
            parts.append(html.folded(f"{search.name}: the chosen sub-network", text))
    return "".join(parts)


def _facts(search: FoundSubnet) -> list[str]:
    result = search.result
    words = []
    for cost in _COSTS:
        if (limit := search.limit(cost)) is not None:
            unit = f" {result.get('latency_unit', '')}" if cost == "latency" else ""
            name = {"macs": "MACs", "params": "parameters", "latency": "latency"}[cost]
            words.append(f"{name} {f'{limit[0]:,.6g} to' if limit[0] else 'at most'} {limit[1]:,.9g}{unit}")
    step = finite(result.get("step"))
    return [
        search.name,
        ", ".join(words) or "-",
        str(result.get("algorithm") or "-"),
        f"{len(search.rows):,}",
        "-" if step is None else f"{step:,.0f}",
        _cost(result, "macs"),
        _cost(result, "params"),
    ]


def _cost(result: dict[str, Any], cost: str) -> str:
    value = finite(result.get(cost))
    if value is None:
        return "-"
    return f"{value:.4g} {result.get('latency_unit', '')}".strip() if cost == "latency" else f"{value:,.0f}"


def _scores(search: FoundSubnet) -> list[str]:
    values = [finite(search.result.get(key)) for key in ("search_top1", "val_top1")]
    return ["-" if value is None else f"{100 * value:.2f}" for value in values]
