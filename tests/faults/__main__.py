"""Break runs in every way of the reliability table and print it.

python -m tests.faults [--full] [--only F1 F5] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .cases import CASES, Row, Suite


def table(rows: list[Row]) -> str:
    """Markdown table of the rows."""
    lines = ["| fault | trials | passed | worst lost steps | worst recovery seconds |", "|---|---|---|---|---|"]
    for row in rows:
        lost = "-" if row.lost_steps is None else str(row.lost_steps)
        recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.1f}"
        lines.append(f"| {row.fault} | {row.trials} | {row.passed} | {lost} | {recovery} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases; 1 where one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every trial; without it each fault at least once")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, default=None, help="keep runs and logs here")
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file")
    arguments = parser.parse_args()
    logging.getLogger("efftrain_ds").setLevel(logging.ERROR)  # damaged checkpoints are meant here
    with tempfile.TemporaryDirectory() as temporary:
        suite = Suite(arguments.folder or Path(temporary), arguments.full)
        rows = []
        for name in arguments.only:
            rows.append(CASES[name](suite))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            for problem in rows[-1].problems:
                print(f"  {problem}", flush=True)
        print("\n" + table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.passed < row.trials for row in rows))


if __name__ == "__main__":
    sys.exit(main())
