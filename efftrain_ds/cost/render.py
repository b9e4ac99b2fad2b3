"""The priced plan as text (at most 120 columns) and as a picture."""

from __future__ import annotations

from pathlib import Path

from ..core.replay import total_loaded
from ..core.text import align, bytes_text, duration_text, short_settings
from .plan import PricedPlan, PricedStage, bandwidth_of

WIDTH = 120
_FREE = {"ra_magnitude", "replay"}  # settings that do not change the cost
LONGER_BASELINE = 1.5


def macs_text(macs: float) -> str:
    """GMACs with three significant digits."""
    giga = macs / 1e9
    return f"{giga:.2f}" if giga >= 1 else f"{giga:.3f}" if giga >= 0.01 else f"{giga:.5f}"


def plan_table(plan: PricedPlan) -> str:
    """One row for each stage, then the totals."""
    timed, counted = plan.seconds is not None, plan.data_epochs is not None
    head = ["stage", "from step", "steps", "epochs", "settings", "micro x acc", "GMACs/img", "memory", "share", "time"]
    rows = [head]
    for s in plan.stages:
        rows.append(
            [
                str(s.stage.index + 1),
                f"{s.stage.start_step:,}",
                f"{s.stage.steps:,}",
                f"{s.epochs:.1f}" if s.epochs is not None else "-",
                short_settings(s.stage.settings)[:36],
                f"{s.stage.micro_batch} x {s.stage.accumulation}",
                macs_text(s.macs),
                bytes_text(s.memory.total),
                f"{100 * s.share:.1f}%",
                _time(s),
            ]
        )
    drop = ({9} if not timed else set()) | ({3} if not counted else set())
    rows = [[c for i, c in enumerate(row) if i not in drop] for row in rows]
    table = align(rows, left=(rows[0].index("settings"),))
    rule = "-" * max(len(line) for line in table)
    return "\n".join([table[0], rule, *table[1:], rule, *total_lines(plan)])


def _time(stage: PricedStage) -> str:
    if stage.seconds is None or stage.prediction is None:
        return "-"
    return duration_text(stage.seconds) + ("" if stage.prediction.how == "measured" else " *")


def total_lines(plan: PricedPlan) -> list[str]:
    """Totals of the plan against the dense baseline."""
    spec = plan.schedule.spec
    batches = dict.fromkeys(f"{s.stage.batch:,}" for s in plan.stages)
    passes = f" ({plan.data_epochs:.1f} passes over {spec.samples:,})" if plan.data_epochs is not None else ""
    lines = [
        f"total      {plan.schedule.total_steps:,} steps of {' / '.join(batches)} images = "
        f"{plan.schedule.total_samples:,} images" + ("" if plan.replay_bytes else passes)
    ]
    if plan.replay_bytes:
        lines += [
            f"replay     {total_loaded(plan.schedule):,} of them are loaded{passes}, the others are repeated",
            f"           from a buffer of {bytes_text(plan.replay_bytes)} a rank",
        ]
    cost = f"cost       {plan.total_cost / 1e15:.4g} PMACs"
    if plan.baseline_epochs is None:
        lines.append(f"{cost}, x{plan.relative:.2f} of as many steps at {spec.resolution} px")
    elif spec.steps is not None:
        lines.append(
            f"{cost} = {plan.baseline_epochs:.1f} epochs at {spec.resolution} px, "
            f"x{plan.relative:.2f} of as many steps there"
        )
    else:
        lines.append(
            f"{cost} = {plan.baseline_epochs:.1f} baseline epochs at {spec.resolution} px, "
            f"x{plan.relative:.2f} of {spec.epochs:g} dense epochs"
        )
        if plan.schedule.pacing == "compute":
            longer = LONGER_BASELINE * spec.epochs
            lines.append(
                f"           compute-paced plans are usually compared with {LONGER_BASELINE:g}x longer dense training: "
                f"x{plan.relative / LONGER_BASELINE:.2f} of {longer:g}"
            )
    if plan.range is not None:
        low, high = plan.range
        lines.append(
            f"           searched at run time: between x{low:.2f} and x{high:.2f} of the baseline; "
            "the table shows the uniform schedule"
        )
    lines.append(
        f"memory     at most {bytes_text(plan.peak_memory)} a rank (estimate: {plan.params / 1e6:.1f} M parameters, "
        f"{plan.precision}, ZeRO-{plan.zero_stage}, {spec.world} rank{'s' if spec.world != 1 else ''})"
    )
    if plan.seconds is not None:
        mark = "  * interpolated" if any(s.prediction and s.prediction.how != "measured" for s in plan.stages) else ""
        lines += [f"time       {duration_text(plan.seconds)} for the steps alone{mark}", f"           {plan.source}"]
    return lines


def _groups(plan: PricedPlan) -> list[tuple[str, list[tuple[float, float]]]]:
    """Label and [start, end) in share of cost of every setting that differs in cost, in order of appearance."""
    groups: dict[str, list[tuple[float, float]]] = {}
    position = 0.0
    for s in plan.stages:
        label = short_settings(s.stage.settings, leave=_FREE)
        spans = groups.setdefault(label, [])
        if spans and abs(spans[-1][1] - position) < 1e-12:
            spans[-1] = (spans[-1][0], position + s.share)
        else:
            spans.append((position, position + s.share))
        position += s.share
    return list(groups.items())


def plan_bars(plan: PricedPlan, width: int = 80) -> str:
    """A timeline in characters: one row for each setting, its place and length in share of cost."""
    groups = _groups(plan)
    margin = max(len(label) for label, _ in groups)
    lines = []
    for label, spans in groups:
        cells = [" "] * width
        for start, end in spans:
            first = min(round(start * width), width - 1)
            for i in range(first, max(round(end * width), first + 1)):
                cells[i] = "#"
        share = sum(end - start for start, end in spans)
        lines.append(f"{label.ljust(margin)} |{''.join(cells)}| {100 * share:5.1f}%")
    lines.append(f"{' ' * margin} 0{'share of cost'.center(width)}1")
    return "\n".join(lines)


def plan_text(plan: PricedPlan) -> str:
    """The whole plan: heading, methods, table, totals and timeline."""
    spec = plan.schedule.spec
    lines = [f"{plan.model or 'model'}, {plan.params / 1e6:.1f} M parameters, {spec.resolution} px"]
    lines += [f"  {name}: {line}" if line else f"  {name}" for name, line in plan.methods]
    return "\n".join([*lines, "", plan_table(plan), "", plan_bars(plan)])


def plan_png(plan: PricedPlan, path: str | Path) -> None:
    """Write the timeline as a picture: input side, depth and augmentation strength over the share of cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spec = plan.schedule.spec
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    edges, sides, strengths, labels = [0.0], [], [], []
    for s in plan.stages:
        edges.append(edges[-1] + 100 * s.share)
        sides.append(bandwidth_of(s.stage.settings, spec.resolution))
        labels.append(f"{sides[-1]}" + (f" d{s.stage.settings['depth']}" if "depth" in s.stage.settings else ""))
        strengths.append(s.stage.settings.get("ra_magnitude"))
    axes.stairs(sides, edges, fill=True, alpha=0.35, color="tab:blue")
    axes.set(xlabel="share of training cost (%)", ylabel="input side (px)", xlim=(0, 100))
    axes.set_ylim(0, 1.12 * max(spec.resolution, *sides))
    previous = None
    for left, right, side, label in zip(edges, edges[1:], sides, labels, strict=False):
        if label != previous:
            axes.text(left + 0.6, side, label, va="bottom", color="tab:blue")
        previous = label
        axes.axvline(right, color="0.85", lw=0.6, zorder=0)
    if all(v is not None for v in strengths):
        other = axes.twinx()
        other.stairs(strengths, edges, baseline=None, color="tab:orange")
        other.set(ylabel="RandAugment magnitude", ylim=(0, 11))
    against = f", x{plan.relative:.2f} of dense training" if plan.full_macs else ""
    axes.set_title(f"{plan.model}: {plan.schedule.total_steps:,} steps{against}", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))
