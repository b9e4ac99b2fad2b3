"""Two made-up methods, registered for the tests of this folder only."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import Field, model_validator

from efftrain_ds.config.sections import DurationText, Fraction
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.strict import StrictModel
from efftrain_ds.methods import builtin


class StageConfig(StrictModel):
    """One stage."""

    until: Fraction
    """Progress at which it ends."""
    bandwidth: int = Field(gt=0)
    """Side of the crop."""


class CurveConfig(StrictModel):
    """A curriculum."""

    schedule: Literal["et", "et++"] | list[StageConfig] = "et++"
    """Name or stages."""
    stages: list[StageConfig] = []
    """Stages without a union."""


class ThinConfig(StrictModel):
    """A mask."""

    density: Fraction = 0.5
    """Kept share."""
    update_every: DurationText | None = None
    """Interval."""
    heads: tuple[int, int] = (1, 2)
    """Range of heads."""
    mode: int | Literal["auto"] = "auto"
    """Number or auto."""
    share: Fraction | DurationText | None = None
    """Fraction or duration."""
    limit: float | None = None
    """Needed with density 1."""

    @model_validator(mode="after")
    def _limit(self) -> ThinConfig:
        if self.density == 1 and self.limit is None:
            raise ValueError('"limit" is needed when "density" is 1')
        return self


class CurveMethod(Method):
    name = "test_curve"
    Config = CurveConfig
    phase = "data"


class ThinMethod(Method):
    name = "test_thin"
    Config = ThinConfig


class RivalMethod(Method):
    name = "test_rival"
    conflicts_with = ("test_thin",)
    needs = ("test_curve",)


@pytest.fixture(autouse=True)
def _no_builtin_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the real methods out: their imports are slow and have nothing to do with these tests."""
    monkeypatch.setattr(builtin, "BUILTIN_MODULES", ())


@pytest.fixture
def methods() -> Iterator[SimpleNamespace]:
    classes = (CurveMethod, ThinMethod, RivalMethod)
    for cls in classes:
        register_method(cls)
    yield SimpleNamespace(CurveConfig=CurveConfig, ThinConfig=ThinConfig, StageConfig=StageConfig)
    for cls in classes:
        unregister_method(cls.name)
