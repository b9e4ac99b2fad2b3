"""``efftrain report``: one HTML page and a picture of a run, or of several side by side; needs no network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("report", help="write one HTML page and a picture of a run, or compare runs")
    parser.add_argument("run", metavar="RUN", help="output folder of a run, finished or in progress")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="further runs, on the same axes")
    parser.add_argument("--output", metavar="FILE", help="HTML file (default RUN/report.html); the PNG goes beside it")
    parser.add_argument("--json", action="store_true", help="print the compared numbers as JSON")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is.

    Raises:
        ConfigError: a folder is not that of a run, or the file cannot be written.
    """
    from ..observe.report import read_run, write_report
    from ..observe.report.compare import numbers, target

    folders = [args.run, *args.compare]
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    output = Path(args.output) if args.output else Path(args.run) / "report.html"
    page, picture = write_report(runs, output)
    if args.json:
        level = target(runs)
        found = {"report": str(page), "picture": str(picture), "target_top1": level}
        print(json.dumps({**found, "runs": [numbers(r, level).plain() for r in runs]}, indent=1))
        return 0
    print(f"report   {page}\npicture  {picture}")
    for one in runs:
        for note in one.notes:
            print(f"note     {one.name}: {note}")
    return 0


def distinct_names(folders: list[str]) -> list[str]:
    """Names of folders; where two are equal, as much of the path before them as tells them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = [p[-1] for p in parts]
    for length in range(2, max(map(len, parts)) + 1):
        twice = {n for n in names if names.count(n) > 1}
        if not twice:
            break
        names = [
            "/".join(p[-length:]).replace("//", "/") if n in twice else n for p, n in zip(parts, names, strict=True)
        ]
    return [f"{n} ({names[:i].count(n) + 1})" if n in names[:i] else n for i, n in enumerate(names)]
