"""The page: what stands in it and in which order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ... import __version__
from ...core.errors import ConfigError
from ...core.files import write_whole
from ...core.text import duration_text
from . import figures, html, parts, subnets, troubles
from .compare import numbers, target
from .figures import cost_unit
from .run import RunData


def write_report(runs: Sequence[RunData], output: str | Path, now: float | None = None) -> tuple[Path, Path]:
    """Write the report of the first run, and how the others compare; returns the HTML file and the picture beside it.

    Args:
        runs: at least one; the first is what ratios refer to.
        output: the HTML file; its folder is made. The picture has the same name with ".png".
        now: time of writing in seconds since the epoch; None takes the clock.

    Raises:
        ConfigError: a file cannot be written, or `output` is a picture's name.
    """
    path = Path(output)
    if path.suffix.lower() == ".png":
        raise ConfigError(f'--output: the page is HTML and the picture goes beside it as .png; found "{path.name}"')
    picture = path.with_suffix(".png")
    moment = time.time() if now is None else now
    text = report_html(runs, moment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in one go, so that a reader of the old page never sees half a new one
        write_whole(path, text)
        figures.to_png(figures.overview(runs, headline(runs)), picture)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error}") from error
    return path, picture


def report_html(runs: Sequence[RunData], now: float) -> str:
    """The document."""
    run = runs[0]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    title = run.name if len(runs) == 1 else " against ".join(r.name for r in runs)
    body = [f"<header><h1>{html.esc(title)}</h1>", html.paragraph(f"EffTrain-DS {__version__}, written {made}", "soft")]
    if len(runs) == 1:
        sections = run_sections(run, now, "run")
        body += [_nav(sections), "</header>", *(text for _, _, text in sections)]
    else:
        keys = [("compare", "comparison"), *((f"r{i}", r.name) for i, r in enumerate(runs))]
        body += [_nav([(key, name, "x") for key, name in keys]), "</header>", comparison(runs)]
        for i, one in enumerate(runs):
            inner = "\n".join(text for _, _, text in run_sections(one, now, f"r{i}"))
            opened = " open" if i == 0 else ""
            body.append(
                f'<details class="run" id="r{i}"{opened}><summary>{html.esc(one.name)}</summary>\n{inner}\n</details>'
            )
    return html.page(title, "\n".join(part for part in body if part))


def _nav(sections: Sequence[tuple[str, str, str]]) -> str:
    links = [f'<a href="#{html.esc(key)}">{html.esc(title)}</a>' for key, title, text in sections if text]
    return f"<nav>{''.join(links)}</nav>"


def run_sections(run: RunData, now: float, key: str) -> list[tuple[str, str, str]]:
    """(key, title, HTML) of every section of one run, without the empty ones."""
    drawn = [
        ("learning", "Learning", _drawing(run, "learning", key)),
        ("system", "Speed and memory", _drawing(run, "system", key)),
    ]
    made = [
        ("summary", "Summary", parts.summary(run, now)),
        ("plan", "Plan against actual", parts.plan_against_actual(run) + _drawing(run, "schedule", key)),
        *drawn,
        ("pictures", "What the network sees", parts.pictures(run)),
        ("maps", "What lives", parts.maps(run)),
        ("subnets", "Sub-networks", subnets.subnets(run, key)),
        ("decisions", "Decisions", troubles.decisions_table(run)),
        ("faults", "Restarts and faults", troubles.restarts(run, now)),
        ("evals", "Evaluations", parts.evaluations(run)),
        ("commands", "Commands", parts.commands(run)),
        ("machine", "Versions and machine", parts.machine(run)),
        ("config", "Configuration and files", parts.configuration(run)),
    ]
    return [
        (f"{key}-{name}", title, html.section(title, text, key=f"{key}-{name}")) for name, title, text in made if text
    ]


_CAPTIONS = {
    "learning": "Dotted lines are stage edges, dashed ones resumes. Cost is by plan, time that of the steps alone.",
    "system": "Dotted lines are stage edges, dashed ones resumes.",
    "schedule": "What ran.",
}


def _drawing(run: RunData, name: str, key: str) -> str:
    if name == "learning":
        if "loss" not in run.traces and not run.evaluations:
            return ""
        drawn, label = figures.learning([run]), "loss and top-1 against steps, cost and time"
    elif name == "system":
        drawn, label = figures.system([run]), "speed, memory and optimizer traces against steps"
    else:
        drawn, label = figures.schedule(run), "settings over the share of the cost"
    caption = _CAPTIONS[name]
    if name == "schedule" and run.end is None:
        caption += " The dashed line shows how far the run has come; what lies beyond it is planned."
    return "" if drawn is None else html.figure(figures.to_svg(drawn, f"{key}-{name}", label), caption)


def headline(runs: Sequence[RunData]) -> str:
    """One line on the first run, for the picture."""
    run = runs[0]
    found = numbers(run)
    words = [run.name if len(runs) == 1 else " against ".join(r.name for r in runs)]
    if len(runs) == 1:
        if run.plan.get("model"):
            words.append(str(run.plan["model"]))
        if found.relative_cost is not None:
            words.append(f"x{found.relative_cost:.2f} of dense training")
        if found.best_top1 is not None:
            words.append(f"best top-1 {100 * found.best_top1:.2f} %")
        if found.train_seconds is not None:
            words.append(duration_text(found.train_seconds))
        if not found.finished:
            words.append("not finished")
    return "  |  ".join(words)


def comparison(runs: Sequence[RunData]) -> str:
    """Table with ratios to the first run, and the curves on the same axes."""
    level = target(runs)
    found = [numbers(run, level) for run in runs]
    first = found[0]
    size, unit = cost_unit(max((n.cost_macs or 0.0 for n in found), default=0.0))

    def ratio(value: float | None, base: float | None) -> str:
        return f" (x{value / base:.2f})" if value is not None and base and value is not base else ""

    def timed(value: float | None, base: float | None) -> str:
        return "-" if value is None else duration_text(value) + ratio(value, base)

    def cost(value: float | None, base: float | None) -> str:
        return "-" if value is None else f"{value / size:.4g}" + ratio(value, base)

    def accuracy(value: float | None, base: float | None) -> str:
        if value is None:
            return "-"
        off = f" ({100 * (value - base):+.2f})" if base is not None and value is not base else ""
        return f"{100 * value:.2f}{off}"

    head = [
        "run",
        "steps",
        f"cost, {unit}",
        "of its dense baseline",
        "training time",
        "wall time",
        "best top\u20111, %",
    ]
    head += ["final top\u20111, %"]  # a hyphen that does not break the line
    if level is not None:
        head += [f"cost to {100 * level:.1f} %", f"time to {100 * level:.1f} %"]
    rows = []
    for n in found:
        row = [
            n.name + ("" if n.finished else " (not finished)"),
            f"{n.steps:,}",
            cost(n.cost_macs, first.cost_macs),
            f"x{n.relative_cost:.2f}" if n.relative_cost is not None else "-",
            timed(n.train_seconds, first.train_seconds),
            timed(n.wall_seconds, first.wall_seconds),
            accuracy(n.best_top1, first.best_top1),
            accuracy(n.final_top1, first.final_top1),
        ]
        if level is not None:
            row += [cost(n.target_cost_macs, first.target_cost_macs), timed(n.target_seconds, first.target_seconds)]
        rows.append(row)
    text = f"In brackets: over {first.name}; of top-1, the difference in percentage points. Cost: of the steps done."
    if level is not None:
        text += f" The last columns tell when a run first reached {100 * level:.2f} %, which all of them did."
    drawn = [("learning", figures.learning(runs)), ("system", figures.system(runs))]
    curves = [
        html.figure(figures.to_svg(f, f"compare-{name}", f"{name} curves of all runs"), caption)
        for (name, f), caption in zip(
            drawn,
            ("Lines: training loss and top-1 of the model; dotted with marks: held-out loss.", "One colour a run."),
            strict=True,
        )
        if f is not None
    ]
    return html.section(
        "Comparison", html.table(head, rows, left=(0,)), html.paragraph(text, "soft"), *curves, key="compare"
    )
