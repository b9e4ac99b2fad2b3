"""Growth of the bundled run: full training, manual schedules and the searched one, several seeds, interleaved.

    python benchmarks/growth.py [--seeds 3] [--epochs 12] [--ranks 2] [--arms full,manual] [--out F]

All arms have the same model, data, recipe and number of epochs. The training time is everything from the first step to
the last but evaluations and checkpoints, so it holds the searches, their measurements and the rebuilds; the whole
process (imports, start-up, evaluations) stands beside it. Ratios are to "full" of the same seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, spread, store
from curriculum import run

from efftrain_ds.observe.journal import read_journal

METHOD = "efftrain.methods.autoprog"
SEARCH = {"stages": 4, "search": {"epochs": 1, "probe_samples": 512}}
ARMS: dict[str, tuple[str, list[str]]] = {
    "full": ("no method", ["efftrain.methods={}"]),
    "manual": ("ramps, MoGrow, optimizer state carried", []),
    "reset": ("ramps, MoGrow, optimizer state reset", [f"{METHOD}.state=reset"]),
    "interpolation": ("ramps, plain interpolation, state carried", [f"{METHOD}.operator=interpolation"]),
    "searched": ("searched (1 epoch each), MoGrow, state carried", [f"{METHOD}={json.dumps(SEARCH)}"]),
}
"""Name of every arm: what it is, and its changes to the configuration."""

FIXED = [
    "efftrain.observe.images_every=null",
    "efftrain.observe.tensorboard=false",
    "efftrain.observe.eval_every=50%",
    "efftrain.checkpoint.every=null",
]


def measure(config: str, ranks: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One training: seconds, top-1 (as shares), and what the growth did."""
    found = run(config, ranks, folder, overrides)
    events = list(read_journal(folder / "journal.jsonl"))
    start = next(e for e in events if e["event"] == "start")
    end = next(e for e in events if e["event"] == "end")
    others = end["others"]
    training = end["time"] - start["time"] - others.get("eval", 0.0) - others.get("checkpoint", 0.0)
    chosen = [
        [r["depth"], r["resolution"]]
        for e in events
        if e["event"] == "growth_search"
        for r in e["table"]
        if r["chosen"]
    ]
    rebuilds = [e["seconds"] for e in events if e["event"] == "rebuild"]
    return {**found, "steps_seconds": found["seconds"], "seconds": training, "rebuilds": rebuilds, "chosen": chosen}


def summarise(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Minimum, median and maximum of each figure of each arm over the seeds."""
    summary: dict[str, dict[str, Any]] = {}
    for arm, found in rows.items():
        values = {key: spread([r[key] for r in found]) for key in ("seconds", "wall", "top1", "ema_top1")}
        if "full" in rows:
            pairs = list(zip(found, rows["full"], strict=True))
            values["ratio_training_time"] = spread([a["seconds"] / b["seconds"] for a, b in pairs])
            values["ratio_whole_process"] = spread([a["wall"] / b["wall"] for a, b in pairs])
            values["top1_difference"] = spread([a["top1"] - b["top1"] for a, b in pairs])
            values["ema_top1_difference"] = spread([a["ema_top1"] - b["ema_top1"] for a, b in pairs])
        summary[arm] = {"about": ARMS[arm][0], **values}
    return summary


def markdown(summary: dict[str, dict[str, Any]]) -> str:
    """A table: median (minimum to maximum)."""

    def cell(values: dict[str, float] | None, form: str, scale: float = 1.0) -> str:
        if values is None:
            return "-"
        low, middle, high = (format(scale * values[key], form) for key in ("min", "median", "max"))
        return f"{middle} ({low} to {high})"

    lines = [
        "| Arm | Training s | x full | Process s | x full | Top-1 % | EMA top-1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, values in summary.items():
        cells = [
            f"{arm}: {values['about']}",
            cell(values["seconds"], ".0f"),
            cell(values.get("ratio_training_time"), ".2f"),
            cell(values["wall"], ".0f"),
            cell(values.get("ratio_whole_process"), ".2f"),
            cell(values["top1"], ".1f", 100),
            cell(values["ema_top1"], ".1f", 100),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all arms for all seeds, store the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/smoke_autoprog_vit_fmnist.json")
    parser.add_argument("--epochs", type=float, default=12, help="epochs of every arm, at least 4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"which of {', '.join(ARMS)}")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    arms = args.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms: unknown {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if args.epochs < 4:
        parser.error("--epochs: 4 stages need at least 4 epochs")
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            turn = seed % len(arms)
            for arm in [*arms[turn:], *arms[:turn]]:  # no arm always comes first
                changes = [f"efftrain.run.epochs={args.epochs:g}", f"efftrain.run.seed={seed}"]
                overrides = [*FIXED, *changes, *args.overrides, *ARMS[arm][1]]
                found = measure(args.config, args.ranks, Path(scratch) / f"{arm}-{seed}", overrides)
                rows[arm].append(found)
                top1 = f"top1 {100 * found['top1']:.2f}%  ema {100 * found['ema_top1']:.2f}%"
                sizes = "  " + " ".join(f"d{d}R{r}" for d, r in found["chosen"]) if found["chosen"] else ""
                print(
                    f"seed {seed} {arm:<14}{found['seconds']:7.1f} s{found['wall']:8.1f} s  {top1}{sizes}", flush=True
                )
    summary = summarise(rows)
    settings = {"config": args.config, "ranks": args.ranks, "epochs": args.epochs, "seeds": args.seeds}
    command = " ".join(["python", *sys.argv])
    path = store("growth", command, {**settings, "arms": summary, "runs": rows}, args.out)
    print(f"\n{markdown(summary)}\n\nwritten to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    main()
