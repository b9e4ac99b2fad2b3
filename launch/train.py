"""Train from a DeepSpeed JSON with an "efftrain" section.

On one machine:    deepspeed launch/train.py --ds_config ds_configs/X.json
On many nodes:     deepspeed --hostfile hostfile launch/train.py --ds_config ds_configs/X.json
A search alone:    deepspeed launch/train.py --ds_config ds_configs/X.json --search growth
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from efftrain_ds.cli.args import add_config_arguments
from efftrain_ds.cli.search import SEARCHES, add_output_argument
from efftrain_ds.core.errors import ConfigError, EffTrainError, ModelError, PlanError


def main() -> int:
    """Parse the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the DeepSpeed launcher")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--measure",
        type=int,
        nargs="?",
        const=24,
        default=None,
        metavar="STEPS",
        help="time STEPS steps of every kind of stage (default 24), store the profile for the plan, and stop",
    )
    mode.add_argument(
        "--search",
        choices=SEARCHES,
        default=None,
        help="run only this search, without the training between its stages, and write what it chose",
    )
    add_output_argument(parser, "--search_output")
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        from efftrain_ds.config.loader import load_config

        config = load_config(arguments.ds_config, overrides=arguments.overrides, world=world)
        if arguments.search is not None:
            from efftrain_ds.train_search import run_search

            run_search(config, arguments.search_output)
        else:
            from efftrain_ds.trainer import Trainer

            Trainer(config, measure_steps=arguments.measure).run()
    except EffTrainError as error:
        # what is wrong with the input is the same on all ranks: one of them says it
        if rank == 0 or not isinstance(error, (ConfigError, PlanError, ModelError)):
            print(f"[rank {rank}] {error}" if rank else str(error), file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        print(f"[rank {rank}]", traceback.format_exc(), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that failed must not wait for the others in the destructor of the process group
    os._exit(code) if code else sys.exit(0)
