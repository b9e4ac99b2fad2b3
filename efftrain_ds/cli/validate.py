"""``efftrain validate``: check a configuration and explain every mistake; nothing is started."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..core.redact import redacted
from .args import add_set_argument


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("validate", help="check a configuration file and explain what is wrong")
    parser.add_argument("file", metavar="FILE", help="DeepSpeed JSON")
    add_set_argument(parser)
    parser.add_argument("--world", type=int, help="number of ranks, to check the batch sizes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print "OK" lines, or raise what is wrong (with ``--json``: print it).

    Raises:
        ConfigError: the configuration is wrong.
    """
    from ..config.issues import ConfigIssues, Issue, table
    from ..config.loader import build_methods, check_config
    from ..core.errors import ConfigError

    try:
        loaded = check_config(args.file, overrides=args.overrides, world=args.world)
        build_methods(loaded)
        run, where = loaded.efftrain.run, "efftrain.run"
        if (loaded.methods or loaded.efftrain.model.name) and run.epochs is None and run.steps is None:
            raise ConfigIssues([Issue(where, 'no budget. Give "epochs" or "steps"')], args.file)
    except ConfigError as error:
        if not args.json:
            raise
        issues = getattr(error, "issues", None) or (Issue("", str(error)),)
        print(json.dumps({"ok": False, "file": args.file, "errors": _plain(issues), "warnings": []}, indent=2))
        return error.exit_code
    if args.json:
        print(json.dumps({"ok": True, "file": args.file, "errors": [], "warnings": _plain(loaded.warnings)}, indent=2))
        return 0
    print(f"OK  {args.file}")
    print(f"OK  methods: {', '.join(loaded.methods) or 'none'}")
    print(f"OK  batch: {_batch_line(loaded.deepspeed, args.world)}")
    if loaded.efftrain.model.name:
        print(f"the model, the data and the schedule are checked by: efftrain plan {args.file}")
    if loaded.warnings:
        count = f"{len(loaded.warnings)} warning" + ("s" if len(loaded.warnings) > 1 else "")
        print(f"{count}\n{table(loaded.warnings)}", file=sys.stderr)
    return 0


def _batch_line(deepspeed: dict[str, Any], world: int | None) -> str:
    from ..config.deepspeed_keys import ACCUMULATION, BATCH, MICRO, batch_sizes

    if world is None:
        given = [f"{key} {deepspeed[key]}" for key in (BATCH, MICRO, ACCUMULATION) if deepspeed.get(key) is not None]
        return ", ".join(given) + " (give --world to check the product)"
    sizes = batch_sizes(deepspeed, world)
    return f"{sizes.batch} = {sizes.micro_batch} x {sizes.accumulation} x {world} (micro-batch x accumulation x world)"


def _plain(issues: Any) -> list[dict[str, str]]:
    return [{"key": issue.key, "text": redacted(issue.text)} for issue in issues]
