"""The bundled run with and without the curriculum: wall-clock ratio and accuracy, several seeds, interleaved.

    python benchmarks/curriculum.py [--seeds 3] [--ranks 2] [--out F]

The baseline is the same file without the method, at full resolution and full RandAugment, for `--baseline_epochs`.
The time is that of the training steps (no start-up, evaluation or checkpoint), and the whole process beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, launcher, spread, store

from efftrain_ds.observe.journal import read_journal


def run(config: str, ranks: int, folder: Path, overrides: list[str]) -> dict:
    """One training in processes of its own; returns seconds, accuracy and the evaluations on the way."""
    command = [*launcher(ranks), "launch/train.py", "--ds_config", config, "--set", f"efftrain.run.output={folder}"]
    for text in overrides:
        command += ["--set", text]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wall = time.monotonic() - start
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    events = list(read_journal(folder / "journal.jsonl"))
    end = next(e for e in events if e["event"] == "end")
    evaluations = [e for e in events if e["event"] == "eval"]
    curve = [{"step": e["step"], "seconds": e["train_seconds"], "top1": e["top1"]} for e in evaluations]
    return {
        "seconds": end["seconds"],
        "wall": wall,
        "top1": end["top1"],
        "ema_top1": end.get("ema_top1"),
        "curve": curve,
    }


def main() -> None:
    """Run all pairs and store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/smoke_et_vit_fmnist.json")
    parser.add_argument("--baseline_epochs", type=float, default=None, help="default: 1.5 x the curriculum's budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    epochs = json.loads((ROOT / args.config).read_text())["efftrain"]["run"]["epochs"]
    baseline_epochs = args.baseline_epochs or 1.5 * epochs
    common = [
        "efftrain.observe.images_every=null",
        "efftrain.observe.tensorboard=false",
        "efftrain.checkpoint.every=null",
    ]
    common += ["efftrain.observe.eval_every=20%", *args.overrides]
    sides = {
        "curriculum": [],
        "baseline": ["efftrain.methods={}", f"efftrain.run.epochs={baseline_epochs:g}"],
    }
    rows: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            order = list(sides) if seed % 2 == 0 else list(sides)[::-1]
            for side in order:
                overrides = [*common, *sides[side], f"efftrain.run.seed={seed}"]
                result = run(args.config, args.ranks, Path(scratch) / f"{side}-{seed}", overrides)
                rows[side].append(result)
                print(
                    f"seed {seed} {side:<10} {result['seconds']:7.1f} s  top1 {100 * result['top1']:.2f}%", flush=True
                )
    ratios = [c["seconds"] / b["seconds"] for c, b in zip(rows["curriculum"], rows["baseline"], strict=True)]
    walls = [c["wall"] / b["wall"] for c, b in zip(rows["curriculum"], rows["baseline"], strict=True)]
    top1 = {side: [r["top1"] for r in found] for side, found in rows.items()}
    summary = {
        "config": args.config,
        "ranks": args.ranks,
        "epochs": {"curriculum": epochs, "baseline": baseline_epochs},
        "ratio_training_time": spread(ratios),
        "ratio_whole_process": spread(walls),
        "top1_mean": {side: statistics.mean(values) for side, values in top1.items()},
        "top1_stdev": {side: statistics.stdev(v) if len(v) > 1 else 0.0 for side, v in top1.items()},
        "runs": rows,
    }
    path = store("curriculum", " ".join(["python", *sys.argv]), summary, args.out)
    print(
        f"training time x{summary['ratio_training_time']['median']:.3f} (median of {len(ratios)}), "
        f"whole process x{summary['ratio_whole_process']['median']:.3f}"
    )
    for side in sides:
        print(f"{side:<10} top1 {100 * summary['top1_mean'][side]:.2f}% +- {100 * summary['top1_stdev'][side]:.2f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
