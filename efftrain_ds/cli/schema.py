"""``efftrain schema``: the JSON Schema of the configuration file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("schema", help="write the JSON Schema of the configuration, for editors")
    parser.add_argument("--out", metavar="FILE", help="write there instead of to the screen")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="import this module first (repeatable)"
    )
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the schema, or write it to ``--out``.

    Raises:
        ConfigError: a plugin cannot be imported, or the file cannot be written.
    """
    from ..config.schema import json_schema
    from ..core.errors import ConfigError
    from ..core.registry import import_plugins

    import_plugins(args.plugin)
    text = json.dumps(json_schema(), indent=2)
    if args.out is None:
        print(text)
        return 0
    try:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"efftrain schema: cannot write {args.out}: {error}") from error
    print(f"{args.out}: JSON Schema written")
    return 0
