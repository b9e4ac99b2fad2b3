"""Budgets of a search: what sub-networks may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...core.errors import ConfigError, EffTrainError
from ...models.elastic import Space

Measure = Callable[[np.ndarray], np.ndarray]


class Predictor(Protocol):
    """What a latency provider can do (see `latency`)."""

    unit: str
    device: str

    def predict(self, config: Any) -> float:
        """Cost of a sub-network in `unit`."""
        ...


@dataclass(frozen=True)
class Limit:
    """Sub-networks whose cost lies between two values, both included.

    Attributes:
        name: e.g. "MACs" or "latency".
        unit: e.g. "ms"; may be empty.
        measure: costs [n] of rows of codes [n, D].
        low: least cost.
        high: largest cost.
        cheap: whole tables can be measured in no time.
        about: how costs are found, for people; may be empty.
    """

    name: str
    unit: str
    measure: Measure
    low: float
    high: float
    cheap: bool = True
    about: str = ""

    def inside(self, codes: np.ndarray) -> np.ndarray:
        """Which rows are within the limit, [n] bool."""
        costs = np.asarray(self.measure(codes))
        return (costs >= self.low) & (costs <= self.high)

    def check(self, space: Space[Any]) -> None:
        """Refuse a limit that even the smallest sub-network exceeds, or that the largest does not reach.

        Raises:
            ConfigError: such a limit.
        """
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"{self.name} from {self._text(self.low)} to {self._text(self.high)}: nothing lies there")
        ends = np.stack([space.codes(space.min()), space.codes(space.max())])
        least, most = (float(cost) for cost in self.measure(ends))
        if least > self.high:
            raise ConfigError(
                f"{self.name} of at most {self._text(self.high)}: the smallest sub-network of the space already has "
                f"{self._text(least)}"
            )
        if most < self.low:
            raise ConfigError(
                f"{self.name} of at least {self._text(self.low)}: the largest sub-network of the space has "
                f"{self._text(most)}"
            )

    def _text(self, value: float) -> str:
        return f"{value:,.6g} {self.unit}".strip()


def macs_limit(space: Space[Any], high: float, low: float = 0, formula: str = "exact") -> Limit:
    """MACs of one image from `low` to `high`."""
    return Limit("MACs", "", lambda codes: space.macs_of(codes, formula), low, high)


def params_limit(space: Space[Any], high: float, low: float = 0, position: bool = True) -> Limit:
    """Parameters from `low` to `high`, with or without tables of positions."""
    return Limit("parameters", "", lambda codes: space.params_of(codes, position), low, high)


def latency_limit(space: Space[Any], provider: Predictor, high: float, low: float = 0.0, *, about: str = "") -> Limit:
    """Latency by a provider, from `low` to `high` in its unit. Each sub-network is asked for once.

    What the provider raises, or answers that is no number, becomes a `ConfigError` when the limit is asked.
    """
    known: dict[bytes, float] = {}

    def measure(codes: np.ndarray) -> np.ndarray:
        costs = np.empty(len(codes))
        for j, row in enumerate(codes):
            key = row.tobytes()
            if key not in known:
                known[key] = _predicted(provider, space.config(row))
            costs[j] = known[key]
        return costs

    return Limit(f"latency on {provider.device}", provider.unit, measure, low, high, cheap=False, about=about)


def _predicted(provider: Predictor, config: Any) -> float:
    try:
        value = float(provider.predict(config))
    except EffTrainError:
        raise
    except Exception as error:  # a provider may be anybody's code
        raise ConfigError(f"latency on {provider.device}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ConfigError(f"latency on {provider.device}: {value} for {config}; a finite number is needed")
    return value


def inside(limits: Sequence[Limit], codes: np.ndarray) -> np.ndarray:
    """Which rows are within all limits, [n] bool. Later limits are measured only where the earlier ones hold."""
    good = np.ones(len(codes), bool)
    for limit in limits:
        if good.any():
            good[good] = limit.inside(codes[good])
    return good
