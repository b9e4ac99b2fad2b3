"""Whole trainings of several arms for several seeds, interleaved: what the accuracy comparisons share.

An arm is a name, what it is in words, and its changes to one configuration. All arms have the same data, recipe and
number of epochs. The training time is everything from the first step to the last but evaluations and checkpoints; the
whole process (imports, start-up, evaluations) stands beside it. Ratios are to the first arm of the same seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, spread, store
from curriculum import run

from efftrain_ds.observe.journal import read_journal

FIXED = [
    "efftrain.observe.images_every=null",
    "efftrain.observe.tensorboard=false",
    "efftrain.observe.eval_every=50%",
    "efftrain.checkpoint.every=null",
]
Arms = Mapping[str, tuple[str, list[str]]]
Facts = Callable[[Path, list[dict[str, Any]]], dict[str, Any]]
"""What one kind of comparison reads from a run's folder and journal beside time and accuracy."""


def parser_of(about: str | None, arms: Arms, config: str, epochs: float) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=config)
    parser.add_argument("--epochs", type=float, default=epochs, help="epochs of every arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--arms", default=",".join(arms), help=f"which of {', '.join(arms)}")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out")
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, arms: Arms) -> list[str]:
    """Names of the arms to run; ends the program where one is unknown."""
    names = args.arms.split(",")
    if unknown := [name for name in names if name not in arms]:
        parser.error(f"--arms: unknown {', '.join(unknown)}; there are {', '.join(arms)}")
    return names


def compare(
    name: str, args: argparse.Namespace, arms: Arms, names: list[str], facts: Facts, extra: Mapping[str, str]
) -> None:
    """Run all arms for all seeds, store the result as ``results/<name>.json``, print the table.

    Args:
        name: of the result.
        args: of `parser_of`.
        arms: all arms.
        names: those to run; the first is what the others are compared with.
        facts: reads more figures from a run; numbers named in `extra` go into the table.
        extra: heading by key of `facts`.
    """
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            turn = seed % len(names)
            for arm in [*names[turn:], *names[:turn]]:  # no arm always comes first
                changes = [f"efftrain.run.epochs={args.epochs:g}", f"efftrain.run.seed={seed}"]
                overrides = [*FIXED, *changes, *args.overrides, *arms[arm][1]]
                found = _measure(args.config, args.ranks, Path(scratch) / f"{arm}-{seed}", overrides, facts)
                rows[arm].append(found)
                top1 = f"top1 {100 * found['top1']:.2f}%"
                if found["ema_top1"] is not None:
                    top1 += f"  ema {100 * found['ema_top1']:.2f}%"
                print(f"seed {seed} {arm:<22}{found['seconds']:7.1f} s{found['wall']:8.1f} s  {top1}", flush=True)
    summary = _summarise(rows, arms, [*extra])
    settings = {"config": args.config, "ranks": args.ranks, "epochs": args.epochs, "seeds": args.seeds}
    result = {**settings, "arms": summary, "runs": rows}
    path = store(name, " ".join(["python", *sys.argv]), result, args.out)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"\n{_markdown(summary, extra)}\n\nwritten to {shown}")


def _measure(config: str, ranks: int, folder: Path, overrides: list[str], facts: Facts) -> dict[str, Any]:
    """One training: seconds, top-1 (as shares), and what `facts` reads."""
    found = run(config, ranks, folder, overrides)
    events = list(read_journal(folder / "journal.jsonl"))
    start = next(e for e in events if e["event"] == "start")
    end = next(e for e in events if e["event"] == "end")
    others = end["others"]
    training = end["time"] - start["time"] - others.get("eval", 0.0) - others.get("checkpoint", 0.0)
    return {**found, "steps_seconds": found["seconds"], "seconds": training, **facts(folder, events)}


def _summarise(rows: dict[str, list[dict[str, Any]]], arms: Arms, extra: list[str]) -> dict[str, dict[str, Any]]:
    """Minimum, median and maximum of each figure of each arm over the seeds."""
    summary: dict[str, dict[str, Any]] = {}
    first = next(iter(rows.values()))
    averaged = all(r["ema_top1"] is not None for found in rows.values() for r in found)
    accuracies = ("top1", "ema_top1") if averaged else ("top1",)
    for arm, found in rows.items():
        values = {key: spread([r[key] for r in found]) for key in ("seconds", "wall", *accuracies, *extra)}
        pairs = list(zip(found, first, strict=True))
        values["ratio_training_time"] = spread([a["seconds"] / b["seconds"] for a, b in pairs])
        values["ratio_whole_process"] = spread([a["wall"] / b["wall"] for a, b in pairs])
        for key in accuracies:
            values[f"{key}_difference"] = spread([a[key] - b[key] for a, b in pairs])
            values[f"{key}_mean"] = sum(a[key] for a in found) / len(found)
        summary[arm] = {"about": arms[arm][0], **values}
    return summary


def _markdown(summary: dict[str, dict[str, Any]], extra: Mapping[str, str]) -> str:
    """A table: median (minimum to maximum)."""

    def cell(values: dict[str, float] | None, form: str, scale: float = 1.0) -> str:
        if values is None:
            return "-"
        low, middle, high = (format(scale * values[key], form) for key in ("min", "median", "max"))
        return middle if low == high else f"{middle} ({low} to {high})"

    first = next(iter(summary))
    heads = ["Arm", "Training s", f"x {first}", "Process s", f"x {first}", "Top-1 %", "EMA top-1 %", *extra.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, values in summary.items():
        cells = [
            f"{arm}: {values['about']}",
            cell(values["seconds"], ".0f"),
            cell(values["ratio_training_time"], ".2f"),
            cell(values["wall"], ".0f"),
            cell(values["ratio_whole_process"], ".2f"),
            cell(values["top1"], ".1f", 100),
            cell(values.get("ema_top1"), ".1f", 100),
            *(cell(values[key], ".4g") for key in extra),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
