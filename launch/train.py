"""Train from a DeepSpeed JSON with an "efftrain" section.

On one machine:    deepspeed launch/train.py --ds_config ds_configs/X.json
On many nodes:     deepspeed --hostfile hostfile launch/train.py --ds_config ds_configs/X.json
A search alone:    deepspeed launch/train.py --ds_config ds_configs/X.json --search growth (or subnet, curriculum)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

from efftrain_ds.cli.args import add_config_arguments
from efftrain_ds.cli.search import SEARCHES, add_dry_run_argument, add_output_argument
from efftrain_ds.core.errors import ConfigError, EffTrainError, ModelError, PlanError
from efftrain_ds.core.redact import redacted

WAIT_FOR_THE_FIRST = 10.0
"""Seconds that rank 0 has to say what is wrong before the others do."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What the network layers (gloo, NCCL) say where a process at the other end is gone."""


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
    add_dry_run_argument(parser)
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.search != "curriculum":
        parser.error("--dry_run belongs to --search curriculum; efftrain plan FILE prices a run")
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = None
    try:
        from efftrain_ds.config.loader import load_config

        config = load_config(arguments.ds_config, overrides=arguments.overrides, world=world)
        if arguments.search is not None:
            if arguments.search == "subnet":
                from efftrain_ds.train_subnet import run_subnet_search

                run_subnet_search(config, arguments.search_output)
            elif arguments.search == "curriculum":
                from efftrain_ds.train_curriculum import run_curriculum_search

                run_curriculum_search(config, arguments.search_output, dry_run=arguments.dry_run)
            else:
                from efftrain_ds.train_search import run_search

                run_search(config, arguments.search_output)
        else:
            from efftrain_ds.trainer import Trainer

            Trainer(config, measure_steps=arguments.measure).run()
    except EffTrainError as error:
        if rank and isinstance(error, (ConfigError, PlanError, ModelError)):
            # What is wrong with the input is the same on all ranks: the first one says it. The launcher ends all ranks
            # as soon as one has failed, so the others stay until then; one that nobody ends says it, too.
            time.sleep(WAIT_FOR_THE_FIRST)
        text = redacted(str(error))
        print(f"[rank {rank}] {text}" if rank else text, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        text = redacted(traceback.format_exc())
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
            text += (
                f"another rank has ended, and so this one does: the connection to it is lost at rank {rank}. Why it "
                "ended is in the output of its node.\n"
            )
        print(f"[rank {rank}]", text, file=sys.stderr, flush=True)
        if config is not None:
            _keep(Path(config.efftrain.run.output) / f"crash.rank{rank}.txt", text)
        return 1
    return 0


def _keep(path: Path, text: str) -> None:
    """Keep what an unexpected error said, with the environment, beside the run's other files."""
    from efftrain_ds.observe.environment import environment

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n{json.dumps({'argv': redacted(sys.argv), **environment()}, indent=1)}\n")
        print(f"written to {path}; go on from the last checkpoint with the same command", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"{path}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk; leaving in the ordinary way would flush again, and make it an error
            os._exit(code)
    # a rank that failed must not wait for the others in the destructor of the process group
    os._exit(code) if code else sys.exit(0)
