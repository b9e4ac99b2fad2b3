"""``efftrain search``: run a method's search alone."""

from __future__ import annotations

import argparse
from typing import Any

from .args import add_set_argument

SEARCHES = ("growth", "subnet", "curriculum")
"""What can be searched."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("search", help="run a method's search alone and print what it chose")
    verbs = parser.add_subparsers(dest="search_verb", required=True, metavar="|".join(SEARCHES))
    growth = verbs.add_parser(
        "growth",
        help="AutoProg's growth schedule",
        description="Run the searches of AutoProg without the training between them, in one process, and print the "
        'schedule for "efftrain.methods.autoprog.schedule". On several ranks: '
        "deepspeed launch/train.py --ds_config FILE --search growth",
    )
    growth.add_argument("file", metavar="FILE", help="DeepSpeed JSON with efftrain.methods.autoprog.search")
    add_set_argument(growth)
    add_output_argument(growth, "--output")
    growth.set_defaults(func=run)
    subnet = verbs.add_parser(
        "subnet",
        help="the best sub-network of a trained supernet within a budget",
        description="Search the supernet of the run's newest checkpoint, in one process, for the best sub-network "
        "within efftrain.methods.elasticvit.search, and write it with its weights. On several ranks: "
        "deepspeed launch/train.py --ds_config FILE --search subnet",
    )
    subnet.add_argument("file", metavar="FILE", help="DeepSpeed JSON with efftrain.methods.elasticvit.search")
    add_set_argument(subnet)
    subnet.add_argument(
        "--checkpoint", metavar="DIR", help="checkpoint or run folder (default: the run's output folder)"
    )
    add_output_argument(subnet, "--output", "folder of the results (default: search in the run's output folder)")
    subnet.add_argument(
        "--measure_latency",
        metavar="TABLE",
        help="search nothing: measure all blocks of the space on this machine with ONNX Runtime, compare their sums "
        "with whole networks, and write the JSON file that search.latency_from can name; a table there is completed",
    )
    subnet.set_defaults(func=run_subnet)
    curriculum = verbs.add_parser(
        "curriculum",
        help="EfficientTrain's schedule for your own model and shards",
        description="Print what the search of efftrain.methods.efficienttrain.search costs, run it in one process, and "
        "write the schedule as a configuration that can be started. The same command goes on with a search that was "
        "stopped. On several ranks: deepspeed launch/train.py --ds_config FILE --search curriculum",
    )
    curriculum.add_argument("file", metavar="FILE", help="DeepSpeed JSON with efftrain.methods.efficienttrain.search")
    add_set_argument(curriculum)
    add_output_argument(curriculum, "--output", "folder of the search (default: curriculum in the run's output folder)")
    add_dry_run_argument(curriculum)
    curriculum.set_defaults(func=run_curriculum)
    return parser


_GROWTH_OUTPUT = "JSON file of the schedule (default: search/growth.json in the run's output folder)"


def add_output_argument(parser: argparse.ArgumentParser, name: str, text: str = _GROWTH_OUTPUT) -> None:
    """Add where the result goes, as `search_output`."""
    parser.add_argument(name, dest="search_output", metavar="F", help=text)


def add_dry_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the switch that stops a curriculum search before it trains."""
    parser.add_argument("--dry_run", action="store_true", help="curriculum: print what the search costs, and stop")


def run(args: argparse.Namespace) -> int:
    """Search and print the schedule.

    Raises:
        ConfigError: the configuration is wrong or searches nothing (exit code 2).
        PlanError: the plan cannot run (exit code 3).
    """
    from ..config.loader import load_config
    from ..train_search import check_searches, run_search

    config = load_config(args.file, overrides=args.overrides, world=1)
    check_searches(config)  # before any process group is there
    run_search(config, args.search_output)
    return 0


def run_subnet(args: argparse.Namespace) -> int:
    """Search for a sub-network and write it, or measure a table of latencies.

    Raises:
        ConfigError: the configuration is wrong or has no limit (exit code 2).
        CheckpointError: there is no checkpoint, or it is of another model.
    """
    from ..config.loader import load_config
    from ..core.errors import ConfigError
    from ..train_subnet import check_subnet_search, run_subnet_search
    from ..train_supernets import measure_latency

    config = load_config(args.file, overrides=args.overrides, world=1)
    if args.measure_latency is not None:
        if args.search_output is not None or args.checkpoint is not None:
            raise ConfigError("--measure_latency measures a space alone; --output and --checkpoint belong to a search")
        measure_latency(config, args.measure_latency)
        return 0
    check_subnet_search(config)
    run_subnet_search(config, args.search_output, args.checkpoint)
    return 0


def run_curriculum(args: argparse.Namespace) -> int:
    """Search for a schedule and write it.

    Raises:
        ConfigError: the configuration is wrong or searches nothing (exit code 2).
        PlanError: candidates or limits that do not fit the model (exit code 3).
    """
    from ..config.loader import load_config
    from ..train_curriculum import check_curriculum_search, run_curriculum_search

    config = load_config(args.file, overrides=args.overrides, world=1)
    check_curriculum_search(config)  # before any process group is there
    run_curriculum_search(config, args.search_output, dry_run=args.dry_run)
    return 0
