"""What fails on one rank is raised on all."""

from __future__ import annotations

from typing import Any

import pytest

from efftrain_ds.core import ranks
from efftrain_ds.core.errors import EffTrainError, ShardError
from efftrain_ds.core.ranks import from_first_only, on_every_rank, text_of


def test_an_error_on_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        told.append(value)
        return [value, *others]

    monkeypatch.setattr(ranks, "gather", gathered)
    others: list[Any] = [None]
    assert on_every_rank(lambda: 3) == 3
    others = [(ShardError, "sample 3 is damaged")]
    with pytest.raises(ShardError, match="rank 1: sample 3 is damaged"):
        on_every_rank(lambda: 3)
    others = [(MemoryError, text_of(MemoryError("full")))]
    with pytest.raises(EffTrainError, match="rank 1: MemoryError: full"):
        on_every_rank(lambda: 3)
    others, told[:] = [None], []
    with pytest.raises(ZeroDivisionError):
        on_every_rank(lambda: 1 // 0)
    assert told[0][0] is ZeroDivisionError  # the others were told first


def test_only_the_first_rank_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_first_only(lambda: 3) == 3
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert from_first_only(lambda: 1 // 0) is None
