"""Sections of the page that are text and tables."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from ...core.text import bytes_text, duration_text, short_settings
from ...cost.render import LONGER_BASELINE
from . import html
from .compare import numbers
from .figures import cost_unit
from .history import finite, step_of
from .run import RunData
from .troubles import STALE_SECONDS
from .words import value_text

_PICTURES, _MAPS = 8, 4
_BATCH = "batch-"


def status(run: RunData, now: float) -> str:
    """Finished, or how far it has come and when it gave the last sign of life."""
    session = run.sessions[-1]
    if run.end is not None:
        return f"finished at step {run.steps_done:,}"
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    text = f"not finished: step {run.steps_done:,}{total}"
    planned = finite(run.plan.get("total_cost_macs"))
    if run.cost_done is not None and planned:
        text += f", {100 * run.cost_done / planned:.1f}% of the cost"
    if session.outcome:
        return f"{text}; {session.outcome}"
    if session.ended is not None:
        ago = max(0.0, now - session.ended)
        silent = " - silent, probably stopped" if ago > STALE_SECONDS else ""
        text += f"; last sign of life {duration_text(ago)} ago{silent}"
    return text


def summary(run: RunData, now: float) -> str:
    """Large figures, then what was run."""
    found, plan = numbers(run), run.plan
    items: list[tuple[str, str, str]] = []
    if found.best_top1 is not None and run.best is not None:
        which = "average (EMA)" if run.best[2] == "ema_top1" else "model"
        items.append((f"{100 * found.best_top1:.2f} %", "best top-1", f"{which}, step {found.best_step:,}"))
    if found.relative_cost is not None:
        epochs = finite(plan.get("epochs"))
        against = f"{epochs:g} dense epochs" if epochs else "as many dense steps"
        items.append((f"x{found.relative_cost:.2f}", "planned cost", f"of {against} at {plan.get('resolution')} px"))
    if found.train_seconds is not None:
        remark = "the steps alone"
        if found.predicted_seconds and found.finished:
            off = 100 * (found.train_seconds / found.predicted_seconds - 1)
            remark = f"planned {duration_text(found.predicted_seconds)}, off by {off:+.1f}%"
        elif found.predicted_seconds:
            remark = f"of {duration_text(found.predicted_seconds)} planned"
        items.append((duration_text(found.train_seconds), "training time", remark))
    count = len(run.sessions)
    items.append((duration_text(found.wall_seconds), "wall time", f"{count} session{'s' if count > 1 else ''}"))
    if found.cost_macs:
        size, unit = cost_unit(found.cost_macs)
        images = f"{found.images:,} images" if found.images is not None else ""
        items.append((f"{found.cost_macs / size:.4g}", f"{unit} of training", images))
    data, optim = run.section("data"), run.config.get("optimizer")
    world = run.sessions[-1].head.get("world", plan.get("world"))
    params = finite(plan.get("params"))
    methods = plan.get("methods") if isinstance(plan.get("methods"), list) else []
    pairs = [
        ("status", status(run, now)),
        ("model", _model(run, params)),
        *(("method", _method(m)) for m in methods),
        ("plan", _plan_line(plan)),
        ("data", _data(data, plan)),
        ("engine", _engine(plan, world)),
        ("batch", _number(plan.get("batch"))),
        ("optimizer", _optimizer(optim)),
        ("folder", str(run.folder)),
    ]
    notes = "".join(html.paragraph(note, "soft") for note in run.notes)
    return html.cards(items) + html.definitions(pairs) + notes


def _number(value: Any) -> str:
    found = finite(value)
    return "" if found is None else f"{found:,.0f}"


def _model(run: RunData, params: float | None) -> str:
    name = run.plan.get("model") or run.section("model").get("name") or ""
    size = f", {params / 1e6:.2f} M parameters" if params else ""
    side = f", {run.plan['resolution']} px" if run.plan.get("resolution") else ""
    return f"{name}{size}{side}" if name else ""


def _method(method: Any) -> str:
    if not isinstance(method, dict):
        return str(method)
    return f"{method.get('name')}: {method['line']}" if method.get("line") else str(method.get("name"))


def _plan_line(plan: dict[str, Any]) -> str:
    """The planned cost against the dense baseline, as ``efftrain plan`` words it."""
    cost, epochs = finite(plan.get("total_cost_macs")), finite(plan.get("baseline_epochs"))
    if cost is None:
        return ""
    size, unit = cost_unit(cost)
    text = f"{_number(plan.get('total_steps'))} steps, {cost / size:.4g} {unit}"
    if epochs is not None:
        text += f" = {epochs:.1f} dense epochs at {plan.get('resolution')} px"
    relative, dense = finite(plan.get("relative_cost")), finite(plan.get("epochs"))
    if plan.get("pacing") == "compute" and relative is not None and dense:
        longer = LONGER_BASELINE
        text += f"; compute-paced plans are usually compared with {longer:g}x longer dense training: "
        text += f"x{relative / longer:.2f} of {longer * dense:g} epochs"
    return text


def _data(data: dict[str, Any], plan: dict[str, Any]) -> str:
    if not data.get("train"):
        return ""
    samples = _number(plan.get("samples"))
    text = f"{data['train']}" + (f", {samples} samples" if samples else "")
    return text + (f"; held out: {data['val']}" if data.get("val") else "; no evaluation")


def _engine(plan: dict[str, Any], world: Any) -> str:
    ranks = finite(world)
    words = [f"ZeRO-{plan['zero_stage']}" if "zero_stage" in plan else "", str(plan.get("precision") or "")]
    words.append(f"{ranks:.0f} rank{'s' if ranks != 1 else ''}" if ranks else "")
    return ", ".join(word for word in words if word)


def _optimizer(optimizer: Any) -> str:
    if not isinstance(optimizer, dict):
        return ""
    params = optimizer.get("params")
    params = params if isinstance(params, dict) else {}
    words = [f"{key} {value_text(params[key])}" for key in ("lr", "weight_decay", "betas") if key in params]
    return ", ".join([str(optimizer.get("type", "")), *words])


def plan_against_actual(run: RunData) -> str:
    """Table with two bars a stage, then totals."""
    rows = run.stages
    if not rows:
        return ""
    predicted = all(r.predicted is not None for r in rows)
    timed = [r for r in rows if r.actual is not None]
    total = sum(r.actual or 0.0 for r in rows)
    # bars: seconds where a prediction exists, else shares of the cost and of the time of what was done
    paid = sum(r.share * r.done / max(r.steps, 1) for r in rows)
    lengths = []
    for r in rows:
        if predicted:
            lengths.append((r.predicted, r.actual))
        else:
            share = r.share * r.done / max(r.steps, 1) / paid if paid else 0.0
            lengths.append((share, r.actual / total if r.actual is not None and total else None))
    longest = max(chain.from_iterable((a or 0.0, b or 0.0) for a, b in lengths), default=0.0)
    head = ["stage", "settings", "from step", "steps", "micro x acc", "memory (plan)", "cost (plan)", "time share"]
    head += ["planned", "actual", "off by"] if predicted else ["actual"]
    head.append("")
    table = []
    for position, r in enumerate(rows):
        settings = r.label if dict(r.ran) == dict(r.planned) else f"{r.label} (plan: {short_settings(r.planned)})"
        cells = [
            str(r.index + 1),
            settings,
            f"{r.start:,}",
            f"{r.steps:,}" if r.done in (0, r.steps) else f"{r.done:,} of {r.steps:,}",
            f"{r.split[1]} x {r.split[2]}" if r.split else "-",
            bytes_text(r.memory) if r.memory is not None else "-",
            f"{100 * r.share:.1f}%",
            f"{100 * r.actual / total:.1f}%" if r.actual is not None and total else "-",
        ]
        actual = "-" if r.actual is None else ("" if r.exact else "~") + duration_text(r.actual)
        off = "-" if r.off is None else f"{100 * r.off:+.1f}%"
        cells += [duration_text(r.predicted or 0.0), actual, off] if predicted else [actual]
        cells.append(html.bars(*lengths[position], longest))
        table.append(cells)
    cells = ["total", "", "", f"{sum(r.done for r in rows):,}", "", "", "100.0%", "100.0%" if total else "-"]
    if predicted:
        whole = sum(r.predicted or 0.0 for r in rows)
        so_far = sum(r.predicted_so_far or 0.0 for r in timed)
        off = f"{100 * (total / so_far - 1):+.1f}%" if so_far and total else "-"
        cells += [duration_text(whole), duration_text(total), off]
    else:
        cells.append(duration_text(total) if total else "-")
    table.append([*cells, ""])
    body = html.table(head, table, left=(1,), classes=[*("" for _ in rows), "sum"], markup=(len(head) - 1,))
    return body + _legend(predicted) + _plan_notes(run, predicted)


def _legend(predicted: bool) -> str:
    planned, actual = (
        ("planned time", "actual time") if predicted else ("share of the cost, by plan", "share of the time")
    )
    return (
        f'<p class="soft"><span class="key" style="background:var(--plan)"></span>{planned} &nbsp; '
        f'<span class="key" style="background:var(--c0)"></span>{actual}</p>'
    )


def _plan_notes(run: RunData, predicted: bool) -> str:
    notes = []
    if any(r.actual is not None and not r.exact for r in run.stages):
        notes.append("~ interpolated: the time at an edge of the stage was not written down.")
    if predicted and run.plan.get("source"):
        notes.append(f"Planned time: {run.plan['source']}. It is that of the steps alone.")
    elif not predicted:
        notes.append(
            "No planned time: this machine had no throughput profile when the run began; a run leaves one behind."
        )
    searched = run.plan.get("range")
    if isinstance(searched, list) and len(searched) == 2 and None not in map(finite, searched):
        low, high = map(float, searched)
        notes.append(
            f"Sizes were searched during the run: between x{low:.2f} and x{high:.2f} of the baseline; "
            "the cost by plan is that of the plan that was written last."
        )
    others = run.end.get("others") if run.end else None
    if isinstance(others, dict) and others:
        spent = [f"{name} {duration_text(s)}" for name, value in others.items() if (s := finite(value)) is not None]
        notes.append("Beside the steps: " + ", ".join(spent) + ".")
    return html.paragraph(" ".join(notes), "soft")


def pictures(run: RunData) -> str:
    """Pictures of batches, evenly chosen; those of an earlier run in the same folder are left out."""
    cells = _figures(run, [found for found in _pictures(run) if found[0].stem.startswith(_BATCH)], _PICTURES)
    text = "A row is one sample: the original, what the network sees, and the spectrum with the kept block outlined."
    return html.paragraph(text, "soft") + f'<div class="pictures">{cells}</div>' if cells else ""


def maps(run: RunData) -> str:
    """Pictures of the methods' state (masks, live heads and neurons), a row each, evenly chosen."""
    kinds: dict[str, list[tuple[Path, float | None]]] = {}
    for path, step in _pictures(run):
        if not path.stem.startswith(_BATCH):
            kinds.setdefault(path.stem.rpartition("-step-")[0] or path.stem, []).append((path, step))
    rows = []
    for kind, found in kinds.items():
        cells = _figures(run, found, _MAPS)
        if cells:
            rows.append(f"<h3>{html.esc(kind)}</h3>" + f'<div class="pictures maps">{cells}</div>')
    return "".join(rows)


def _pictures(run: RunData) -> list[tuple[Path, float | None]]:
    """(file, step) of the pictures of this run, by name."""
    starts = [s.began for s in run.sessions if s.kind == "start" and s.began is not None]
    newest = starts[-1] if len(starts) > 1 else 0.0
    found = []
    for path in sorted((run.folder / "pictures").glob("*.png")):
        step = finite(path.stem.rpartition("-")[2])
        if path.is_symlink():  # a page that is handed on must not carry files from elsewhere
            continue
        if path.stat().st_mtime >= newest and (step is None or step <= max(run.steps_done, 0)):
            found.append((path, step))
    return found


def _figures(run: RunData, found: list[tuple[Path, float | None]], limit: int) -> str:
    """At most `limit` of the pictures, evenly chosen, each with its step and stage."""
    if len(found) > limit:
        found = [found[round(i * (len(found) - 1) / (limit - 1))] for i in range(limit)]
    cells = []
    for path, step in found:
        label = next((r.label for r in run.stages if step is not None and r.start <= step < r.start + r.steps), "")
        words = path.stem if step is None else f"step {step:,.0f}" + (f", {label}" if label else "")
        image = html.picture(path, words)
        if image:
            cells.append(f"<figure>{image}<figcaption>{html.esc(words)}</figcaption></figure>")
    return "".join(cells)


def evaluations(run: RunData) -> str:
    """Every evaluation, the best top-1 marked, then the number of checkpoints."""
    rows = run.evaluations
    if not rows:
        return ""
    skip = {"time", "step", "event", "train_seconds", "seconds", "samples"}
    names = [n for n in dict.fromkeys(chain.from_iterable(rows)) if n not in skip]
    names = [n for n in names if any(finite(e.get(n)) is not None for e in rows)]
    head = ["step", "training time", *(f"{n}, %" if _share(n) else n for n in names)]
    table = []
    for event in rows:
        spent = finite(event.get("train_seconds"))
        cells = [f"{step_of(event):,}", duration_text(spent) if spent is not None else "-"]
        for n in names:
            value = finite(event.get(n))
            cells.append("-" if value is None else f"{100 * value:.2f}" if _share(n) else f"{value:.4f}")
        table.append(cells)
    best = run.best[1] if run.best else None
    classes = ["mark" if step_of(e) == best else "" for e in rows]
    saves = [s for e in run.named("checkpoint") if (s := finite(e.get("seconds"))) is not None]
    text = ""
    if saves:
        mean = sum(saves) / len(saves)
        text = f"{len(saves)} checkpoints, {mean:.2f} s each on average, the longest {max(saves):.2f} s."
    return html.table(head, table, classes=classes, small=True) + html.paragraph(text, "soft")


def _share(name: str) -> bool:
    return name.removeprefix("ema_").startswith("top")


def commands(run: RunData) -> str:
    """The command line of every session."""
    lines = []
    for i, s in enumerate(run.sessions):
        argv = s.head.get("argv")
        if isinstance(argv, list) and argv:
            own = [str(a) for a in argv if not str(a).startswith("--local_rank")]
            ranks = finite(s.head.get("world"))
            where = f", in {s.head['cwd']}" if s.head.get("cwd") else ""
            lines.append(f"# {i + 1} {s.kind} at step {s.step:,}, {ranks or 1:.0f} ranks{where}\n{shlex.join(own)}")
        else:
            lines.append(f"# {i + 1} {s.kind} at step {s.step:,}: the command line was not written down")
    text = "Arguments of the training process; start it with the same launcher (deepspeed, torchrun, srun)."
    again = f"efftrain report {shlex.quote(str(run.folder))}"
    return html.pre("\n".join(lines)) + html.paragraph(text, "soft") + html.paragraph("This page:") + html.pre(again)


def machine(run: RunData) -> str:
    """Versions and machine of the last session; what differed in earlier ones is named."""
    fields = ("machine", "device", "host", "cpus", "platform", "python", "versions", "git", "torch", "world")
    last = run.sessions[-1].head
    known = {key: next((s.head[key] for s in reversed(run.sessions) if s.head.get(key)), None) for key in fields}
    if isinstance(known["versions"], dict) and "torch" in known["versions"]:
        known["torch"] = None
    if not known["machine"] and isinstance(run.plan.get("source"), str):
        known["machine"] = run.plan["source"]
    if isinstance(known["git"], dict):
        changed = known["git"].get("changed_files")
        known["git"] = f"{known['git'].get('commit')}" + (f", {changed} files changed" if changed else "")
    names = {"world": "ranks", "cpus": "processors"}
    pairs = [(names.get(key, key), value_text(value, 600)) for key, value in known.items() if value is not None]
    differing = [
        key
        for key in fields
        for s in run.sessions[:-1]
        if s.head.get(key) and last.get(key) and s.head[key] != last[key]
    ]
    note = "Differed between sessions: " + ", ".join(dict.fromkeys(differing)) + "." if differing else ""
    return html.definitions(pairs) + html.paragraph(note, "bad")


def configuration(run: RunData) -> str:
    """The resolved configuration, the plan and the folder's files, folded away."""
    files = []
    for path in sorted(run.folder.iterdir()):
        if path.is_symlink():
            files.append(f"{path.name}  link")
        elif path.is_dir():
            files.append(f"{path.name}/  {sum(1 for p in path.iterdir())} entries")
        else:
            with suppress(OSError):  # a run in progress replaces files
                files.append(f"{path.name}  {bytes_text(path.stat().st_size)}")
    return (
        html.folded("resolved configuration (config.json)", json.dumps(run.config, indent=1) if run.config else "")
        + html.folded("plan (plan.json)", json.dumps(run.plan, indent=1) if run.plan else "")
        + html.folded("files of the run", "\n".join(files))
    )
