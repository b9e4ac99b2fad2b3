"""Method instances of a configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from efftrain_ds.config.loader import build_methods, load_config
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.timeline import PlanSpec


class AverageMethod(Method):
    name = "test_average"

    @property
    def needs_average(self) -> bool:
        """It reads the average."""
        return True


@pytest.fixture(autouse=True)
def _average() -> Any:
    register_method(AverageMethod)
    yield
    unregister_method("test_average")


def load(methods: dict[str, Any], **model: Any) -> Any:
    return load_config({"efftrain": {"schema": 1, "model": model, "methods": methods}})


def test_instances_in_run_order(methods: SimpleNamespace) -> None:
    built = build_methods(load({"test_thin": {"density": 0.25}, "test_curve": {}}))
    assert [m.name for m in built] == ["test_curve", "test_thin"]  # the data phase comes first
    assert built[1].config.density == 0.25


def test_a_method_that_needs_the_average() -> None:
    with pytest.raises(ConfigError, match=r"^efftrain\.model\.ema: null, but efftrain\.methods\.test_average needs"):
        build_methods(load({"test_average": {}}))
    assert [m.name for m in build_methods(load({"test_average": {}}, ema={"decay": 0.998}))] == ["test_average"]


def test_defaults_of_the_protocol() -> None:
    method, model = Method(None), object()
    spec = PlanSpec(0, 1.0, 100, 10, 10, 1, 32, 4)
    assert method.alternatives(spec) == {}
    assert method.architecture() == {}
    assert method.shape_model(model, {"depth": 3}) is model
    assert method.on_rebuilt(None) is None
    assert method.needs_average is False
