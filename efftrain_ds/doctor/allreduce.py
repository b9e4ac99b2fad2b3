"""One process of the all-reduce check: ``python -m efftrain_ds.doctor.allreduce RANK WORLD BACKEND FILE MEGABYTES``.

Rank 0 prints one line of JSON: seconds of the fastest of three reductions, and whether the sums are right.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main(arguments: list[str]) -> int:
    """Join, reduce, compare."""
    rank, world, backend, path, megabytes = arguments
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{path}", rank=int(rank), world_size=int(world), timeout=timedelta(seconds=20)
    )
    values = torch.empty(int(float(megabytes) * 1e6) // 4, dtype=torch.float32, device=device)
    expected = int(world) * (int(world) + 1) / 2
    best, right = float("inf"), True
    for _ in range(4):  # the first one opens the connections
        values.fill_(int(rank) + 1)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        right = right and bool((values == expected).all())
    dist.barrier()
    if rank == "0":
        sys.stdout.write(json.dumps({"seconds": best, "right": right}) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
