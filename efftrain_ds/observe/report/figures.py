"""Figures of a report, drawn once and written as SVG for the page or PNG for a README.

Colours are the Okabe-Ito set, which colour-blind readers can tell apart; every run also has its own marker. In the
SVG, colours become CSS variables of the page, so that the figures follow light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .run import RunData
from .stages import entered_stages
from .traces import Trace

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID, PAPER = "#24303c", "#d8dee4", "#fffffe"
VARIABLES = {**{c: f"var(--c{i})" for i, c in enumerate(SERIES)}, INK: "var(--ink)", GRID: "var(--grid)"}
VARIABLES[PAPER] = "var(--paper)"
"""Colour in a drawing -> CSS variable of the page."""

_RC = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "text.parse_math": False,  # a $ in a run's name is a $
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
}


_WIDTH = 11.0


def panel_grid(rows: int, columns: int, height: float, top: float = 0.25, **shared: Any) -> tuple[Any, np.ndarray]:
    """A figure and its axes [rows, columns]. Margins in inches are given: finding them out takes longer than drawing.

    Args:
        rows: of panels.
        columns: of panels.
        height: of the figure in inches.
        top: margin above in inches.
        shared: `sharex` and `sharey` of matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), facecolor="none")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    gap = 0.25 if shared.get("sharey") else 0.6
    wide = (_WIDTH - 0.75 - gap * (columns - 1)) / columns
    high = (height - 0.5 - top - 0.5 * (rows - 1)) / rows
    figure.subplots_adjust(0.6 / _WIDTH, 0.5 / height, 1 - 0.15 / _WIDTH, 1 - top / height, gap / wide, 0.5 / high)
    return figure, grid


def style() -> Any:
    """The look of all figures, as a context in which they are drawn."""
    from matplotlib import rc_context

    return rc_context(_RC)


def to_svg(figure: Any, prefix: str, label: str) -> str:
    """A figure as an inline SVG element.

    Args:
        figure: matplotlib figure.
        prefix: of every id, so that several figures can stand in one page.
        label: what it shows, for readers who cannot see it.
    """
    from html import escape

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(label)}"'
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = rest.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    rest = re.sub("|".join(VARIABLES), lambda m: VARIABLES[m.group(0)], rest)
    return re.sub(r"\n\s*", "\n", f"{head}>{rest}").strip()


def to_png(figure: Any, path: Path) -> None:
    """Write a figure on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with style():
        figure.set_facecolor("white")
        FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": "efftrain-ds"})


# -- axes ------------------------------------------------------------------------------------------------------


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds of the unit that suits a length of time, and its name."""
    if seconds < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")


def cost_unit(macs: float) -> tuple[float, str]:
    """MACs of the unit that suits a cost, and its name."""
    for size, name in ((1e18, "EMACs"), (1e15, "PMACs"), (1e12, "TMACs")):
        if macs >= size:
            return size, name
    return 1e9, "GMACs"


def _legend_name(run: RunData) -> str:
    return f" {run.name}" if run.name.startswith("_") else run.name  # matplotlib hides names that begin with "_"


def _log_scale(axes: Any) -> None:
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    flat = np.concatenate(values) if values else np.zeros(0)
    flat = flat[np.isfinite(flat)]
    if len(flat) and flat.min() > 0 and flat.max() / flat.min() > 30:
        axes.set_yscale("log")


class _Across:
    """The three horizontal axes: steps, cost, time; one unit each for all runs."""

    def __init__(self, runs: Sequence[RunData]):
        costs = [float(c[-1]) for r in runs if (c := r.cost_at(np.array([r.steps_done]))) is not None]
        self.cost = cost_unit(max(costs, default=0.0))
        self.time = time_unit(max((r.train_seconds or 0.0 for r in runs), default=0.0))
        self.names = ["optimizer steps", f"training cost ({self.cost[1]})", f"training time ({self.time[1]})"]

    def __call__(self, run: RunData, steps: np.ndarray, which: int) -> np.ndarray | None:
        if which == 0:
            return steps
        found = run.cost_at(steps) if which == 1 else run.seconds_at(steps)
        return None if found is None else found / (self.cost if which == 1 else self.time)[0]


def learning(runs: Sequence[RunData]) -> Any:
    """Loss (above) and top-1 (below) against steps, cost and time; several runs lie over each other."""
    with style():
        figure, grid = panel_grid(2, 3, 5.3, top=0.1, sharey="row")
        across, single = _Across(runs), len(runs) == 1
        for column in range(3):
            for number, run in enumerate(runs):
                _loss(grid[0][column], run, across, column, number, single)
                _top1(grid[1][column], run, across, column, number, single)
            grid[1][column].set_xlabel(across.names[column])
            for row in grid:
                row[column].set_xlim(left=0)
                row[column].tick_params(labelbottom=True)
        grid[0][0].set_ylabel("loss")
        grid[1][0].set_ylabel("top-1 (%)")
        _log_scale(grid[0][0])
        for row in grid:
            handles, labels = row[0].get_legend_handles_labels()
            if handles:
                row[0].legend(handles, labels, fontsize=8)
        return figure


def _loss(axes: Any, run: RunData, across: _Across, which: int, number: int, single: bool) -> None:
    color = SERIES[number % len(SERIES)]
    trace = run.traces.get("loss", Trace()).thinned()
    x = across(run, trace.steps, which) if len(trace) else None
    if x is not None:
        axes.plot(x, trace.values, color=color, label="training" if single else _legend_name(run), alpha=0.9)
    held_out = run.evaluated("loss")
    x = across(run, held_out.steps, which) if len(held_out) else None
    if x is not None:
        label = "held out" if single else None
        color = SERIES[1] if single else color
        axes.plot(x, held_out.values, color=color, marker=MARKERS[number % len(MARKERS)], ls=":", label=label)
    if single:
        _edges(axes, run, across, which)


def _top1(axes: Any, run: RunData, across: _Across, which: int, number: int, single: bool) -> None:
    names = [("top1", "model", SERIES[1], "o"), ("ema_top1", "average (EMA)", SERIES[2], "^")]
    if not single:
        names = [("top1", _legend_name(run), SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)])]
    for name, label, color, marker in names:
        trace = run.evaluated(name)
        x = across(run, trace.steps, which) if len(trace) else None
        if x is not None:
            axes.plot(x, 100 * trace.values, color=color, marker=marker, label=label)
    if single:
        _edges(axes, run, across, which)


def _edges(axes: Any, run: RunData, across: _Across, which: int) -> None:
    """Stage edges as thin dotted lines, resumes as dashed ones."""
    marks = [(step, INK, ":", 0.35) for step, _ in entered_stages(run.events) if step > 0]
    marks += [(s.step, SERIES[3], "--", 0.9) for s in run.sessions if s.kind == "resume" and s.step > 0]
    for step, color, style, alpha in marks:
        x = across(run, np.array([float(step)]), which)
        if x is not None and np.isfinite(x[0]):
            axes.axvline(float(x[0]), color=color, ls=style, lw=0.9, alpha=alpha, zorder=0)


_SYSTEM = (
    ("images_per_s", "images/s of one rank", 1.0),
    ("data_share", "waiting for data (% of a step)", 100.0),
    ("memory", "peak memory of rank 0 (GB)", 1e-9),
    ("lr", "learning rate", 1.0),
    ("grad_norm", "gradient norm before clipping", 1.0),
)


def system(runs: Sequence[RunData]) -> Any | None:
    """Speed, data, memory, learning rate, gradient norm, and time against the plan; None where nothing was traced."""
    present = [(n, label, f) for n, label, f in _SYSTEM if any(len(r.traces.get(n, ())) for r in runs)]
    planned = any(r.stages and r.stages[0].predicted is not None for r in runs)
    timed = any("train_seconds" in r.traces for r in runs)
    count = len(present) + timed
    if not count:
        return None
    with style():
        rows = -(-count // 3)
        figure, grid = panel_grid(rows, 3, 0.3 + 2.4 * rows)
        panels = list(grid.flat)
        for axes, (name, label, factor) in zip(panels, present, strict=False):
            for number, run in enumerate(runs):
                trace = run.traces.get(name, Trace()).thinned()
                axes.plot(trace.steps, factor * trace.values, color=SERIES[number % len(SERIES)])
                if len(runs) == 1:
                    _edges(axes, run, _Across(runs), 0)
            axes.set_title(label, loc="left", fontweight="normal")
            axes.set_xlim(left=0)
            tops = [float(np.nanmax(factor * r.traces[name].values)) for r in runs if len(r.traces.get(name, ()))]
            if name != "lr" and np.isfinite(max(tops)) and max(tops) > 0:
                axes.set_ylim(0, 1.1 * max(tops))
        if timed:
            _clock(panels[len(present)], runs, planned)
        for axes in panels[count:]:
            axes.set_visible(False)
        for axes in panels[max(0, count - 3) : count]:
            axes.set_xlabel("optimizer steps")
        return figure


def _clock(axes: Any, runs: Sequence[RunData], planned: bool) -> None:
    """Training time over steps, and where the plan said it would be (dashed)."""
    unit, name = time_unit(max((r.train_seconds or 0.0 for r in runs), default=0.0))
    for number, run in enumerate(runs):
        color = SERIES[number % len(SERIES)]
        trace = run.traces.get("train_seconds", Trace()).thinned()
        axes.plot([0, *trace.steps], [0, *(trace.values / unit)], color=color, label="actual")
        if run.stages and all(s.predicted is not None for s in run.stages):
            x = [0, *(s.start + s.steps for s in run.stages)]
            y = np.cumsum([0.0, *(s.predicted or 0.0 for s in run.stages)]) / unit
            axes.plot(x, y, color=INK if len(runs) == 1 else color, ls="--", lw=1, label="planned")
    axes.set_title(f"training time ({name})", loc="left", fontweight="normal")
    axes.set(xlim=(0, None), ylim=(0, None))
    if planned and len(runs) == 1:
        axes.legend(fontsize=8)


def schedule(run: RunData) -> Any | None:
    """Input side, depth and augmentation strength as they ran, over the planned cost; None without a plan."""
    stages = run.stages
    if not stages:
        return None
    curves = []
    for keys, label in (
        (("bandwidth", "resolution"), "input side (px)"),
        (("depth",), "depth (blocks)"),
        (("unfrozen",), "unfrozen level"),
        (("ra_magnitude",), "RandAugment magnitude"),
    ):
        values = [min((v for k in keys if isinstance(v := s.ran.get(k), (int, float))), default=None) for s in stages]
        if label.startswith("input") and run.plan.get("resolution"):
            values = [run.plan["resolution"] if v is None else v for v in values]
        if all(v is not None for v in values) and len(set(values)) > 1:
            curves.append((label, values))
    if not curves:
        return None
    edges = 100 * np.cumsum([0.0, *(s.share for s in stages)])
    with style():
        figure, grid = panel_grid(len(curves), 1, 0.6 + 1.25 * len(curves), sharex=True)
        panels = grid[:, 0]
        for number, (axes, (label, values)) in enumerate(zip(panels, curves, strict=True)):
            axes.stairs(values, edges, fill=True, color=SERIES[number % len(SERIES)], alpha=0.3)
            axes.stairs(values, edges, baseline=None, color=SERIES[number % len(SERIES)], lw=1.5)
            axes.set_title(label, loc="left", fontweight="normal")
            axes.set(xlim=(0, 100), ylim=(0, 1.15 * max(values)))
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
            if run.cost_done is not None and run.end is None:
                done = 100 * run.cost_done / max(1.0, float(run.plan.get("total_cost_macs") or 1))
                axes.axvline(done, color=INK, lw=1, ls="--")
        panels[-1].set_xlabel("share of the run's cost (%), by plan")
        return figure


def overview(runs: Sequence[RunData], headline: str) -> Any:
    """The picture for a README: loss against cost, accuracy against time, and the time of each stage or run."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(_WIDTH, 3.5), layout="constrained", facecolor="none")
        left, middle, right = figure.subplots(1, 3)
        across, single = _Across(runs), len(runs) == 1
        for number, run in enumerate(runs):
            _loss(left, run, across, 1 if run.plan else 0, number, single)
            _top1(middle, run, across, 2 if run.train_seconds else 0, number, single)
        left.set(title="loss", xlabel=across.names[1 if runs[0].plan else 0], xlim=(0, None))
        middle.set(title="top-1 (%)", xlabel=across.names[2 if runs[0].train_seconds else 0], xlim=(0, None))
        _log_scale(left)
        for axes in (left, middle):
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                axes.legend(handles, labels, fontsize=8)
        if single:
            _stage_bars(right, runs[0])
        else:
            _run_bars(right, runs)
        figure.suptitle(headline, x=0.01, ha="left", fontsize=10.5)
        return figure


def _stage_bars(axes: Any, run: RunData) -> None:
    rows = [s for s in run.stages if s.actual is not None or s.predicted is not None]
    if not rows:
        axes.set_visible(False)
        return
    unit, name = time_unit(sum(s.actual or s.predicted or 0.0 for s in rows))
    places = np.arange(len(rows))
    if any(s.predicted is not None for s in rows):
        axes.barh(places - 0.2, [(s.predicted or 0) / unit for s in rows], 0.38, color=GRID, label="planned")
    axes.barh(places + 0.2, [(s.actual or 0) / unit for s in rows], 0.38, color=SERIES[0], label="actual")
    axes.set_yticks(places, [s.label for s in rows], fontsize=8 if len(rows) <= 12 else 6)
    axes.invert_yaxis()
    axes.set(title=f"plan against actual ({name})")
    axes.grid(axis="y", visible=False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, fontsize=8)


def _run_bars(axes: Any, runs: Sequence[RunData]) -> None:
    seconds = [r.train_seconds or 0.0 for r in runs]
    unit, name = time_unit(max(seconds))
    places = np.arange(len(runs))
    axes.barh(places, [s / unit for s in seconds], 0.6, color=[SERIES[i % len(SERIES)] for i in range(len(runs))])
    axes.set_yticks(places, [_legend_name(r) for r in runs], fontsize=8)
    axes.invert_yaxis()
    axes.set(title=f"training time ({name})")
    axes.grid(axis="y", visible=False)
