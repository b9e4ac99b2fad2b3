"""Every fault at least once; ``python -m tests.faults --full`` is the whole table."""

from __future__ import annotations

import pytest

from tests.faults.cases import CASES, Suite

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", list(CASES))
def test_fault(suite, name):
    row = CASES[name](suite)
    assert row.trials
    assert not row.problems
