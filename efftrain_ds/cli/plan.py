"""``efftrain plan``: the stages of a run and what they cost, before it starts; needs no device."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .args import add_set_argument


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("plan", help="show the stages of a run and what they cost, before it starts")
    parser.add_argument("file", metavar="FILE", help='DeepSpeed JSON with an "efftrain" section')
    add_set_argument(parser)
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of ranks (default 1)")
    parser.add_argument("--throughput", metavar="F", help="measured profile (JSON), for predicted hours")
    parser.add_argument("--png", metavar="F", help="also write the timeline as a picture")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigError: the configuration is wrong (exit code 2).
        PlanError: the plan cannot run (exit code 3).
    """
    from ..config.loader import load_config
    from ..cost.render import plan_png, plan_text
    from ..cost.throughput import load_throughput
    from ..planning import make_plan

    profile = load_throughput(args.throughput) if args.throughput else None
    loaded = load_config(args.file, overrides=args.overrides, world=args.world)
    plan = make_plan(loaded, world=args.world, throughput=profile)
    print(json.dumps(plan.to_dict(), indent=1) if args.json else plan_text(plan))
    if args.png:
        plan_png(plan, args.png)
    return 0
