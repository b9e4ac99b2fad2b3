"""Functions run on the ranks by the tests of the search for a sub-network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from efftrain_ds import train_subnet
from efftrain_ds.core.errors import EffTrainError, ShardError
from efftrain_ds.core.ranks import on_every_rank
from efftrain_ds.methods.elasticvit.config import SearchConfig
from efftrain_ds.methods.elasticvit.search import Score, Search, limits_of
from tests.distributed.elasticvit_jobs import PLAIN


def _error_of(action: Any) -> tuple[str, str]:
    try:
        action()
    except EffTrainError as error:
        return type(error).__name__, str(error)
    return "", ""


def one_fails_job() -> list[tuple[str, str]]:
    """What each rank raises where rank 1 alone fails: for a candidate, on a held-out image, on its checkpoint."""
    rank = dist.get_rank()

    def score(config: Any) -> Score:
        if rank == 1:
            raise ShardError("the candidate cannot be scored")
        return Score(0.5, 1.0)

    def judge(best: Any) -> None:
        if rank == 1:
            raise ShardError("a held-out image is damaged")

    def load(source: Any) -> None:
        if rank == 1:
            raise OSError("no such disk")

    config = SearchConfig(macs=10**9, evaluations=8, population=4)
    limits = limits_of(config, PLAIN, "exact")
    search = Search(config, PLAIN, SimpleNamespace(score=score), limits)  # type: ignore[arg-type]
    errors = [_error_of(search.run)]
    whole = SimpleNamespace(_judge=judge, world=2)
    errors.append(_error_of(lambda: train_subnet.SubnetSearch._held_out(whole, None)))  # type: ignore[arg-type]
    try:
        on_every_rank(lambda: load(None))
    except (EffTrainError, OSError) as error:
        errors.append((type(error).__name__, str(error)))
    dist.barrier()  # no rank is left in another collective
    return errors
