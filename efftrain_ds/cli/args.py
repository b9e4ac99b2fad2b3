"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--set PATH=VALUE`` (repeatable) as `overrides`, a list of texts."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one key of the file, e.g. efftrain.run.epochs=100 or train_batch_size=256 (repeatable)",
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--ds_config`` (synonym ``--deepspeed_config``) as `ds_config`, and ``--set`` as `overrides`."""
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        dest="ds_config",
        required=required,
        metavar="FILE",
        help='DeepSpeed JSON with an "efftrain" section',
    )
    add_set_argument(parser)
