"""Making tables of sub-networks: how many are drawn, priced and placed in a level in a minute, on one core.

"drawn and priced" draws sub-networks of ElasticViT's space at random and counts the MACs of each. "tables" makes whole
tables of the published levels under their smallest sub-networks: the figure counts everything that was drawn, also what
fell into no level. Processor time of the process; rounds of all cases are interleaved, and the median counts.

    python benchmarks/supernet_tables.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from common import spread, store

from efftrain_ds.methods.elasticvit.levels import Levels, published_smallest
from efftrain_ds.methods.elasticvit.tables import CHUNK, build_tables
from efftrain_ds.models.elastic import autoformer_space, elasticvit_space

AIM = 1e6


def main() -> None:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds with small tables")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--rows", type=int, default=None, help="sub-networks a table")
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    rounds, rows = args.rounds or (3 if args.quick else 7), args.rows or (50 if args.quick else 500)
    torch.set_num_threads(1)
    space, plain, levels = elasticvit_space(), autoformer_space("tiny"), Levels()
    smallest = published_smallest(space, levels)
    rng = np.random.default_rng(0)

    def drawn(own: object, formula: str) -> Callable[[int], int]:
        def run(_: int) -> int:
            own.macs_of(own.sample_codes(rng, CHUNK), formula)
            return CHUNK

        return run

    def tables(seed: int) -> int:
        made = build_tables(space, levels, smallest, rows=rows, seed=seed)
        # levels with one smallest sub-network share their draws: the longest series of each counts
        longest: dict[int, int] = {}
        for index, table in enumerate(made):
            group = smallest.by_level[index]
            longest[group] = max(longest.get(group, 0), table.drawn)
        return sum(longest.values())

    cases: dict[str, Callable[[int], int]] = {
        "ElasticViT, drawn and priced (exact)": drawn(space, "exact"),
        "ElasticViT, drawn and priced (reference)": drawn(space, "reference"),
        "AutoFormer-T, drawn and priced": drawn(plain, "exact"),
        f"ElasticViT, tables of {len(levels)} levels with {rows} rows": tables,
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run(0)
    for number in range(rounds):
        for name, run in cases.items():
            start = time.process_time()
            count = run(1 + number)
            rates[name].append(60 * count / (time.process_time() - start))
    result = {"rounds": rounds, "rows": rows, "subnets a minute": {name: spread(row) for name, row in rates.items()}}
    for name, row in rates.items():
        median = statistics.median(row)
        print(f"{name:56s} {median / 1e6:7.1f} M a minute ({'at least' if median >= AIM else 'BELOW'} 1 M)")
    command = f"python benchmarks/supernet_tables.py --rounds {rounds} --rows {rows}"
    print(store("supernet_tables", command, result, args.out))


if __name__ == "__main__":
    main()
