"""The search for a sub-network on two ranks."""

from __future__ import annotations

import pytest

from tests.distributed import subnet_jobs as jobs

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_no_rank_waits_for_one_that_failed(ranks):
    first, second = ranks(jobs.one_fails_job)
    assert second == [
        ("ShardError", "the candidate cannot be scored"),
        ("ShardError", "a held-out image is damaged"),
        ("OSError", "no such disk"),
    ]
    assert first == [
        ("ShardError", "rank 1: the candidate cannot be scored"),
        ("ShardError", "rank 1: a held-out image is damaged"),
        ("EffTrainError", "rank 1: OSError: no such disk"),
    ]
