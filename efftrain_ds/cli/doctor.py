"""``efftrain doctor``: can this machine train, and can it train this configuration? A fix for each cross."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from ..core.redact import redacted
from .args import add_set_argument
from .screen import mark, on_terminal, wrapped

_INDENT = 18


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, and a configuration on it, before a run",
        description="Check libraries, devices, collectives, disk and data, and say what to do about each problem. "
        "Exit code 0 without a cross, else 2. On several hosts start it on each: torchrun --nnodes N "
        "--nproc_per_node 1 ... -m efftrain_ds.cli.main doctor, or srun efftrain doctor.",
    )
    parser.add_argument("file", nargs="?", metavar="CONFIG", help='DeepSpeed JSON with an "efftrain" section')
    add_set_argument(parser)
    parser.add_argument("--world", type=int, metavar="N", help="ranks of the run (default: one for each GPU, else 1)")
    parser.add_argument("--json", action="store_true", help="print checks and environment as JSON, for bug reports")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run all checks and print each when it is done.

    Returns:
        0 without a cross, else 2.
    """
    from dataclasses import asdict

    from ..doctor.check import Check, run_checks, verdict
    from ..doctor.comm import hosts_of
    from ..doctor.environment import environment
    from ..doctor.table import CHECKS, make_setup

    start = time.monotonic()
    hosts = hosts_of(os.environ)
    if hosts is not None and hosts.rank > 0:  # the first process shows the table; the others only answer its clock
        list(run_checks(make_setup(None, (), hosts.world), [c for c in CHECKS if c[0] == "clocks"]))
        return 0
    notice = "checking, this takes a few seconds ..." if not args.json and on_terminal() else ""
    print(notice, end="\r" * bool(notice), flush=True)
    found: list[Check] = []
    for check in run_checks(make_setup(args.file, args.overrides, args.world or _world()), CHECKS):
        found.append(check)
        if not args.json:
            print(" " * len(notice) + "\r" * bool(notice) + "\n".join(check_lines(check)), flush=True)
            notice = ""
    good, line = verdict(found, args.file or "training")
    if not args.json:
        print("\n" + "\n".join(wrapped("verdict: ", line, indent=9)))
        return 0 if good else 2
    document = {
        "ok": good,
        "verdict": line,
        "seconds": round(time.monotonic() - start, 1),
        "checks": [asdict(check) for check in found],
        "environment": environment(),
    }
    print(json.dumps(redacted(document), indent=1))
    return 0 if good else 2


def _world() -> int:
    """Ranks of the run: the launcher's number, one for each GPU, else 1."""
    import torch

    return int(os.environ.get("WORLD_SIZE") or (torch.cuda.device_count() if torch.cuda.is_available() else 1))


def check_lines(check: Any) -> list[str]:
    """Mark, name and finding, wrapped; the fix on lines of its own."""
    plain_mark = 1 if on_terminal() else 4
    indent = _INDENT + plain_mark
    head = f"{mark(check.status)} {check.name:<{_INDENT - 1}}"
    lines = wrapped(head, check.text, indent=indent)
    if check.fix:
        lines += wrapped(" " * indent + "fix: ", check.fix, indent=indent + 5)
    return lines
