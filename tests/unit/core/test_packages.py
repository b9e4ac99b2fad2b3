"""Packages for some things only."""

from __future__ import annotations

import pytest

from efftrain_ds.core import packages
from efftrain_ds.core.errors import ConfigError


def test_what_is_there_is_not_refused_and_not_imported() -> None:
    packages.require("this", ("json", "antigravity"), "dev")  # importing the second one would open a browser


def test_all_that_is_missing_is_named_with_the_way_to_get_it() -> None:
    with pytest.raises(ConfigError) as caught:
        packages.require("latency with a clock", ("no_such_one", "json", "no_such_other"), "clocks")
    assert str(caught.value) == (
        'latency with a clock needs no_such_one, no_such_other; install with: pip install "efftrain-ds[clocks]"'
    )
