"""Cost of the proxy with no method configured: step time and start-up against plain DeepSpeed.

    python benchmarks/overhead.py [--ranks 2] [--rounds 30] [--out F]

Both engines live in the same processes and take turns; the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, free_port, launcher, own_environment, spread, store

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 1000000000,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}
START = """
import time; begin = time.perf_counter()
import {package}, torch
model = torch.nn.Linear(8, 8)
{package}.initialize(model=model, model_parameters=model.parameters(), config={config!r})
print("seconds", time.perf_counter() - begin)
"""


def worker(rounds: int, steps: int, out: str) -> None:
    """One rank: time rounds of plain and adopted steps in turn."""
    import logging

    import deepspeed
    import timm
    import torch
    import torch.distributed as dist

    import efftrain_ds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=2, num_classes=10
    )
    engines = {}
    for name, package in (("plain", deepspeed), ("efftrain", efftrain_ds)):
        own = copy.deepcopy(model)
        engines[name] = package.initialize(model=own, model_parameters=own.parameters(), config=copy.deepcopy(CONFIG))[
            0
        ]
    device = engines["plain"].device
    images, labels = torch.randn(16, 3, 32, 32, device=device), torch.zeros(16, dtype=torch.long, device=device)

    def go(engine: object) -> float:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    for engine in engines.values():
        go(engine)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
            times[name].append(go(engines[name]))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(times))


def start_up(package: str) -> float:
    """Seconds from an empty process to a ready engine, imports included."""

    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    code = START.format(package=package, config=CONFIG)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds")))


def main() -> None:
    """Launch the ranks, time start-ups, store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        worker(args.rounds, args.steps, args.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "times.json"
        command = [*launcher(args.ranks), str(Path(__file__)), "--worker", str(out)]
        command += ["--rounds", str(args.rounds), "--steps", str(args.steps)]
        subprocess.run(command, cwd=ROOT, env=own_environment(), check=True, capture_output=True)
        times = json.loads(out.read_text())
    ratios = [ours / plain for ours, plain in zip(times["efftrain"], times["plain"], strict=True)]
    starts: dict[str, list[float]] = {"deepspeed": [], "efftrain_ds": []}
    for _ in range(args.starts):
        for package in starts:
            starts[package].append(start_up(package))
    extra = [a - b for a, b in zip(starts["efftrain_ds"], starts["deepspeed"], strict=True)]
    result = {
        "ranks": args.ranks,
        "step_ms": {name: spread([1e3 * t for t in found]) for name, found in times.items()},
        "step_ratio": spread(ratios),
        "start_s": {name: spread(found) for name, found in starts.items()},
        "start_extra_s": spread(extra),
    }
    path = store("overhead", " ".join(["python", *sys.argv]), result, args.out)
    print(f"step time x{result['step_ratio']['median']:.4f} (median of {args.rounds} rounds of {args.steps} steps)")
    print(f"start-up {result['start_extra_s']['median']:+.2f} s (median of {args.starts})")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
