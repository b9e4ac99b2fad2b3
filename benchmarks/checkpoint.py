"""What a save costs: plain DeepSpeed and this package in its three forms, in turns in one run.

    python benchmarks/checkpoint.py [--model vit_small_patch16_224] [--stages 0 2 3] [--rounds 7] [--out F]

"pause" is the time for which training stands still, the slower rank counting; "durable" the time until the checkpoint
is complete on disk (DeepSpeed does not sync its files, so its figure ends earlier than its durability). "synchronous"
waits for the disk, "sync" writes and lets threads wait for the disk (what compares with DeepSpeed's save), "background"
copies and lets threads write. Without a GPU: gloo ranks and a ViT in bf16; every fourth save is of one kind, so that a
slow moment of the disk hits all kinds alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, launcher, own_environment, spread, store

KINDS = ("deepspeed", "synchronous", "sync", "background")
BACKGROUND: dict[str, Any] = {"synchronous": False, "sync": "sync", "background": True}


def worker(name: str, stage: int, rounds: int, folder: str, out: str) -> None:
    """One rank: a few steps between saves of all kinds."""
    import timm
    import torch
    import torch.distributed as dist

    import efftrain_ds

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0001, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "efftrain": {"guard": {"nonfinite": False, "decisions": False, "stall_s": None}},
    }
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100)
    engine, *_ = efftrain_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    images = torch.randn(2, 3, 224, 224, dtype=torch.bfloat16, device=engine.device)

    def step() -> float:
        start = time.monotonic()
        loss = engine(images).float().square().mean()
        engine.backward(loss)
        engine.step()
        return time.monotonic() - start

    def slowest(seconds: float) -> float:
        found = torch.tensor([seconds], device=engine.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    steps = [step() for _ in range(3)]
    pauses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    durable: dict[str, list[float]] = {kind: [] for kind in KINDS}
    beside: list[float] = []
    size = {}
    for number in range(rounds + 1):
        for kind in KINDS:
            root = Path(folder) / kind
            dist.barrier()
            start = time.monotonic()
            if kind == "deepspeed":
                engine.deepspeed_engine.save_checkpoint(str(root), tag=f"step-{number}")
            else:
                engine.save_checkpoint(root, tag=f"step-{number}", background=BACKGROUND[kind])
            pause = slowest(time.monotonic() - start)
            if kind == "background":
                beside.append(step())
            engine.finish_saving()
            dist.barrier()
            total = slowest(time.monotonic() - start)
            if number:  # the first round warms the file system up
                pauses[kind].append(pause)
                durable[kind].append(total)
            if dist.get_rank() == 0:
                size[kind] = sum(p.stat().st_size for p in (root / f"step-{number}").rglob("*") if p.is_file())
                shutil.rmtree(root)
            steps.append(step())
            dist.barrier()
    if dist.get_rank() == 0:
        found = {
            "pauses": {k: spread(v) for k, v in pauses.items()},
            "durable": {k: spread(v) for k, v in durable.items()},
            "bytes": size,
            "step_s": statistics.median(steps),
            "step_beside_writing_s": statistics.median(beside),
        }
        Path(out).write_text(json.dumps(found))


def main() -> None:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", nargs=3, metavar=("STAGE", "FOLDER", "OUT"))
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        stage, folder, out = args.worker
        worker(args.model, int(stage), args.rounds, folder, out)
        return
    import torch

    ranks = min(args.ranks, torch.cuda.device_count() or args.ranks)
    print("| stage | MB (DeepSpeed / ours) | step s | pause s: DeepSpeed | waiting | sync | background | durable s |")
    print("|---|---|---|---|---|---|---|---|")
    cases = []
    for stage in args.stages:
        with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
            out = Path(scratch) / "result.json"
            command = [*launcher(ranks), str(Path(__file__)), "--worker", str(stage), scratch, str(out)]
            command += ["--model", args.model, "--rounds", str(args.rounds)]
            done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
            found = {"stage": stage, **json.loads(out.read_text())}
        cases.append(found)
        pause = {kind: values["median"] for kind, values in found["pauses"].items()}
        ratio = {kind: pause[kind] / pause["deepspeed"] for kind in KINDS}
        cells = [stage, f"{found['bytes']['deepspeed'] / 1e6:.0f} / {found['bytes']['synchronous'] / 1e6:.0f}"]
        cells += [f"{found['step_s']:.2f}", f"{pause['deepspeed']:.2f}"]
        cells += [f"{pause[kind]:.2f} (x{ratio[kind]:.2f})" for kind in KINDS[1:]]
        cells.append(f"{found['durable']['synchronous']['median']:.2f}")
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    result = {"model": args.model, "ranks": ranks, "rounds": args.rounds, "cases": cases}
    print(f"written to {store('checkpoint', ' '.join(['python', *sys.argv]), result, args.out)}")


if __name__ == "__main__":
    main()
