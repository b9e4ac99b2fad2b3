"""The ``efftrain`` command.

Each verb is a module of this package with ``add_parser(subparsers)``, which adds one parser and sets its default
``func`` (or ``run``) to a function of the parsed arguments that returns the exit code (None counts as 0). Only the
module of the chosen verb is imported, so that the help is quick; hence no import of torch here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..core.errors import EffTrainError
from ..core.redact import redacted

VERBS: tuple[tuple[str, str], ...] = (
    ("doctor", "check this machine, and a configuration on it, before a run"),
    ("validate", "check a configuration file and explain what is wrong"),
    ("plan", "show the stages of a run and what they cost, before it starts"),
    ("search", "run a method's search alone and print what it chose"),
    ("shards", "pack, index and audit shards"),
    ("inspect", "show what is in a checkpoint, and whether it is good"),
    ("export", "write a checkpoint's model for timm, a hub, or ONNX"),
    ("report", "write one HTML page and a picture of a run, or compare runs"),
    ("bench", "time the GPU kernels on this machine, or tune them"),
    ("schema", "write the JSON Schema of the configuration, for editors"),
)
"""Every verb with its line in the help."""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command; only the arguments of `verb` are filled in."""
    parser = argparse.ArgumentParser(prog="efftrain", description="Cheap training of vision backbones on DeepSpeed.")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, text in VERBS:
        if name == verb:
            importlib.import_module(f".{name}", __package__).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments without the program name; None takes the process's.

    Returns:
        Exit code: 0 done, 2 user error, 3 refused plan, 76 diverged, 130 interrupted. Unexpected exceptions propagate.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        parser = build_parser(verb)
        try:
            args = parser.parse_args(arguments)
        except SystemExit as stop:  # argparse has printed the help (0) or what is wrong with the arguments (2)
            return int(stop.code or 0)
        if args.verb is None:
            parser.print_help(sys.stderr)
            return 2
        function = args.func
        return int(function(args) or 0)
    except EffTrainError as error:
        print(redacted(str(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
