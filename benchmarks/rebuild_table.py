"""What a change of parameters carries, as a table: stage x dtype x offload, on two gloo ranks with a toy model.

    python benchmarks/rebuild_table.py [--quick] [--optimizers]

Identity: a run with an identity rebuild in the middle against one without (losses, gradient norms, masters, moments,
average, weights, buffers, counters, scaler, learning rate; also with skipped steps under fp16). Growth: four blocks to
six, every tensor compared to the bit with an oracle written with plain indexing. Zeros everywhere are what is promised.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from common import ROOT

HEAD = "| stage | dtype | offload | identity: max loss difference | identity: max state difference | other differences "
HEAD += "| growth: wrong tensors | seconds a rebuild |\n|---|---|---|---|---|---|---|---|"


def rows(quick: bool, optimizers: bool) -> list[tuple[int, str, str, dict[str, Any]]]:
    """(stage, dtype, name of the offload, configuration) of each row."""
    sys.path.insert(0, str(ROOT))
    from tests.distributed.rebuild_jobs import OFFLOAD, OFFLOAD_PARAM

    found: list[tuple[int, str, str, dict[str, Any]]] = []
    for stage in range(4):
        found += [(stage, dtype, "-", {}) for dtype in ("fp32", "bf16")]
        if quick:
            continue
        if stage:
            found.append((stage, "fp16", "-", {}))
        if stage == 1:
            found.append((stage, "bf16_fp32", "-", {}))
        if stage:
            found += [(stage, dtype, "optimizer", OFFLOAD) for dtype in ("fp32", "bf16")]
        if stage == 3:
            found += [(stage, dtype, "optimizer + parameters", OFFLOAD_PARAM) for dtype in ("fp32", "bf16")]
        if optimizers and stage:
            cpu_adam = {"optimizer": "ds", **OFFLOAD}
            found += [(stage, dtype, "optimizer, DeepSpeed's CPU Adam", cpu_adam) for dtype in ("fp32", "bf16")]
    return found


def main() -> None:
    """Spawn the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fp32 and bf16 without offload only")
    parser.add_argument("--optimizers", action="store_true", help="DeepSpeed's CPU Adam too (compiled on first use)")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    table = rows(args.quick, args.optimizers)
    from tests.distributed import rebuild_jobs as jobs
    from tests.pool import RankPool

    pool, begin, lines = RankPool(args.ranks), time.monotonic(), []
    try:
        for stage, dtype, offload, extra in table:
            same = pool.run(jobs.identity_job, stage, dtype, extra)
            grown = pool.run(jobs.change_job, stage, dtype, "grow", extra)
            losses, state = max(r["losses"] for r in same), max(r["end_error"] for r in same)
            other = max(len(set(r["at_rebuild"]) | {d for d in r["end"] if "/" not in d}) for r in same)
            wrong = max(len({*r["wrong"], *r["cast"], *r["getter"]}) for r in grown)
            seconds = max(r["seconds"] for r in same)
            cells = [stage, dtype, offload, f"{losses:g}", f"{state:g}", other, wrong, f"{seconds:.2f}"]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    finally:
        pool.close()
    print("\n" + HEAD)  # DeepSpeed prints from the ranks while they work
    print("\n".join(lines))
    print(f"\n{len(table)} configurations, {args.ranks} ranks, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
