"""Time and memory of a change of parameters in mid-run, against the training step of the same run.

    python benchmarks/rebuild.py [--models vit_small_patch16_224 vit_base_patch16_224] [--stages 0 1 2 3] [--out F]

A ViT of depth 6 grows to 12 (every block is cloned behind itself), then has an identity rebuild, in bf16. Without a
GPU: gloo ranks, resident memory (peak of the process, reset before the rebuild). With GPUs: one process a GPU, peak
allocated memory. "extra" is the peak over the steady state, which is the larger of what was used before and after;
"aim" is one sharded copy of the new fp32 state (12 N / W bytes) plus the new low-precision weights (2 N). The C library
is told to give blocks of 1 MiB and more back at once, so that resident memory follows the tensors and not its caches.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, launcher, own_environment, store

MODELS = ["vit_small_patch16_224", "vit_base_patch16_224"]


def config_of(stage: int, keep_old: bool, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration with our section."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0001, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "efftrain": {"run": {"keep_old_state": keep_old}},
    }


class Meter:
    """Memory in bytes: resident on the CPU, allocated on a GPU."""

    def __init__(self, device: Any):
        import torch

        self.torch, self.cuda = torch, device.type == "cuda"

    def now(self) -> int:
        """Used at this moment, after caches are given back."""
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
            return self.torch.cuda.memory_allocated()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return self._status("VmRSS")

    def reset(self) -> bool:
        """Forget the peak; False where the system does not allow it."""
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        """Highest value since the last `reset`."""
        return self.torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def growth(depth: int) -> Any:
    """Every block is followed by a clone of itself."""
    from torch import nn

    from efftrain_ds.zero import request as rq

    origin = [j // 2 for j in range(2 * depth)]

    def surgery(model: nn.Module) -> nn.Module:
        blocks = list(model.blocks)
        model.blocks = nn.Sequential(*[copy.deepcopy(blocks[i]) for i in origin])
        return model

    def request(names: list[str]) -> Any:
        maps = {f"blocks.{j}.{n}": rq.copy(f"blocks.{i}.{n}") for j, i in enumerate(origin) for n in names}
        return rq.RebuildRequest(surgery, maps, reason=f"depth {depth} -> {2 * depth}")

    return request


def worker(model_name: str, stage: int, keep_old: bool, micro_batch: int, steps: int, out: str) -> None:
    """One rank: train, grow, train, identity; rank 0 writes what it saw, the memory being the worst of all ranks."""
    import logging

    import timm
    import torch
    import torch.distributed as dist

    import efftrain_ds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = timm.create_model(model_name, depth=6, num_classes=1000)
    config = config_of(stage, keep_old, micro_batch)
    engine, *_ = efftrain_ds.initialize(
        model=model, model_parameters=model.parameters(), config=config, rebuildable=True
    )
    del model
    device, world = torch.device(engine.device), dist.get_world_size()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    meter = Meter(device)
    images = torch.randn(micro_batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
    labels = torch.zeros(micro_batch, dtype=torch.long, device=device)

    def train(count: int) -> float:
        times = []
        for _ in range(count):
            dist.barrier()
            begin = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
            engine.backward(loss)
            engine.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            del loss
        return statistics.median(times[1:])

    from efftrain_ds.zero.request import RebuildRequest

    names = [n for n, _ in engine.blueprint.blocks[0].named_parameters()]
    result: dict[str, Any] = {"step_s_before": train(steps)}
    for label, request in (("growth", growth(6)(names)), ("identity", RebuildRequest(reason="identity"))):
        dist.barrier()
        before, reset = meter.now(), meter.reset()
        report = engine.rebuild(request)
        peak = meter.peak()
        after = meter.now()
        extra = torch.tensor(
            [peak - before, peak - after, before, after, peak - max(before, after)], dtype=torch.float64
        )
        if device.type == "cuda":
            extra = extra.to(device)
        dist.all_reduce(extra, dist.ReduceOp.MAX)
        step = train(steps)
        number = report.parameters[1]
        aim = 12 * number / (world if stage else 1) + 2 * number
        result[label] = {
            "parameters": number,
            "seconds": report.seconds,
            "parts": dict(report.parts),
            "step_s": step,
            "steps": report.seconds / step,
            "peak_reset": reset,
            "peak_over_before_bytes": extra[0].item(),
            "peak_over_after_bytes": extra[1].item(),
            "before_bytes": extra[2].item(),
            "after_bytes": extra[3].item(),
            "aim_bytes": aim,
            "extra_bytes": extra[4].item(),
            "extra_over_aim": extra[4].item() / aim,
        }
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({**result, "world": world, "device": str(device)}))
    engine.destroy()
    dist.destroy_process_group()


def main() -> None:
    """Launch the ranks for every case, print a table, store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        name, stage, keep, out = args.worker
        worker(name, int(stage), keep == "1", args.micro_batch, args.steps, out)
        return
    import torch

    ranks = min(args.ranks, torch.cuda.device_count() or args.ranks)
    env = own_environment()
    env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    cases, load = [], os.getloadavg()[0]
    head = "| model | stage | old state | rebuild | seconds (plan/teardown/create/restore) | in steps | extra MiB "
    print(head + "| aim MiB |\n|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for stage in args.stages:
            for keep in (True, False):
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "result.json"
                    command = [
                        *launcher(ranks),
                        str(Path(__file__)),
                        "--worker",
                        name,
                        str(stage),
                        str(int(keep)),
                        str(out),
                    ]
                    command += ["--micro_batch", str(args.micro_batch), "--steps", str(args.steps)]
                    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
                    case = {"model": name, "stage": stage, "keep_old": keep, **json.loads(out.read_text())}
                cases.append(case)
                for label in ("growth", "identity"):
                    found = case[label]
                    parts = "/".join(f"{v:.2f}" for v in found["parts"].values())
                    cells = [name, stage, "kept" if keep else "streamed", label, f"{found['seconds']:.2f} ({parts})"]
                    cells += [f"{found['steps']:.1f}", f"{found['extra_bytes'] / 2**20:.0f}"]
                    cells += [f"{found['aim_bytes'] / 2**20:.0f}"]
                    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    result = {"ranks": ranks, "micro_batch": args.micro_batch, "load_at_start": load, "load_at_end": os.getloadavg()[0]}
    path = store("rebuild", " ".join(["python", *sys.argv]), {**result, "cases": cases}, args.out)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
