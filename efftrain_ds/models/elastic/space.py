"""Search spaces: what sub-networks a supernet has, how they are drawn, counted, priced, written down and cut out.

A sub-network is a small frozen configuration of its space. In bulk it is a row of codes: one int8 for each dimension
of the space, the index of the chosen value, and -1 where the dimension does not apply (the heads of a layer that is
left out). Choices ascend, so "at least as large in every dimension" is a comparison of codes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from torch import nn

from ...core.errors import ConfigError, ModelError
from .fields import check_fields

Value = int | float
Codes = np.ndarray
"""[n, D] int8, one row a sub-network."""

ABSENT = -1
FORMULAS = ("exact", "reference")


class SubnetConfig(Hashable, Protocol):
    """What describes one sub-network; frozen, equal and hashed by value."""

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The form that goes into a JSON file; `Space.parse` reads it."""
        ...


ConfigT = TypeVar("ConfigT", bound=SubnetConfig)


@dataclass(frozen=True)
class Dimension:
    """One thing in which sub-networks of a space differ.

    Attributes:
        name: e.g. "vit1.width".
        kind: "resolution", "width", "depth", "expand", "kernel", "mlp", "v_scale" or "heads".
        choices: allowed values, ascending.
        depth: (column of the dimension that decides whether this one applies, least value with which it does).
    """

    name: str
    kind: str
    choices: tuple[Value, ...]
    depth: tuple[int, Value] | None = None

    def __post_init__(self) -> None:
        check_fields({"choices": self.choices}, {"choices": "numbers" if self.kind == "mlp" else "integers"}, self.name)
        if not self.choices or list(self.choices) != sorted(set(self.choices)) or len(self.choices) > 127:
            raise ModelError(
                f"{self.name}: choices {list(self.choices)}; allowed: 1 to 127 different values, ascending"
            )


class Space(ABC, Generic[ConfigT]):
    """A set of sub-networks of one supernet. Subclasses are frozen dataclasses: equal spaces are interchangeable.

    Attributes:
        name: kind of space in the JSON form.
        num_classes: outputs of the classifier.
    """

    name: ClassVar[str]
    num_classes: int

    # -- what a space says of itself ---------------------------------------------------------------------------------

    @cached_property
    @abstractmethod
    def dimensions(self) -> tuple[Dimension, ...]:
        """The columns of `Codes`. A depth column stands before the columns that depend on it."""

    @property
    def ascending(self) -> tuple[int, ...]:
        """Columns whose values must not decrease from each to the next (few, from no depth)."""
        return ()

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """Columns by role: "widths" and "depths" are what a preference for wide or shallow sub-networks compares."""

    @abstractmethod
    def values(self, config: ConfigT) -> list[Value | None]:
        """The value in each dimension, None where it does not apply.

        Raises:
            ModelError: the configuration does not have the form of this space.
        """

    @abstractmethod
    def from_values(self, values: Sequence[Value | None]) -> ConfigT:
        """The configuration with these values."""

    @abstractmethod
    def macs_of(self, codes: Codes, formula: str = "exact") -> np.ndarray:
        """MACs of one image of each sub-network, [n] int64. "exact" is what the network computes."""

    @abstractmethod
    def params_of(self, codes: Codes, position: bool = True) -> np.ndarray:
        """Parameters of each extracted sub-network, [n] int64, with or without tables of positions."""

    @abstractmethod
    def parse(self, data: Any, where: str = "subnet") -> ConfigT:
        """A configuration from its JSON form, checked.

        Args:
            data: from `SubnetConfig.to_dict`.
            where: what errors call it.

        Raises:
            ConfigError: an unknown, missing or ill-typed entry, or a sub-network that the space does not have.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON form of the space; `read_space` reads it."""

    @abstractmethod
    def supernet(self, **kwargs: Any) -> nn.Module:
        """A supernet with fresh weights; called as ``net(images, config)``."""

    @abstractmethod
    def extract(self, net: nn.Module, config: ConfigT) -> nn.Module:
        """A sub-network as a module of its own, with copies of its weights; needs whole (not partitioned) weights.

        Raises:
            ModelError: the space does not have it, or `net` is no supernet of this kind.
        """

    @abstractmethod
    def options(self, net: nn.Module) -> dict[str, Any]:
        """Arguments of `supernet`, for a JSON file, with which an extracted network can be built again."""

    # -- codes -------------------------------------------------------------------------------------------------------

    def codes(self, config: ConfigT) -> np.ndarray:
        """Row of codes [D] of a configuration.

        Raises:
            ModelError: a value that is no choice; constraints between dimensions are `check`'s.
        """
        row = np.empty(len(self.dimensions), np.int8)
        for column, (dimension, value) in enumerate(zip(self.dimensions, self.values(config), strict=True)):
            if value is None:
                row[column] = ABSENT
                continue
            try:
                row[column] = dimension.choices.index(value)
            except ValueError:
                raise ModelError(
                    f"{dimension.name} is {value}; allowed: {', '.join(f'{c:g}' for c in dimension.choices)}"
                ) from None
        return row

    def config(self, codes: np.ndarray) -> ConfigT:
        """The configuration of a row of codes."""
        row = [int(code) for code in codes]
        return self.from_values(
            [None if code < 0 else d.choices[code] for d, code in zip(self.dimensions, row, strict=True)]
        )

    def numbers(self, codes: Codes) -> np.ndarray:
        """Values instead of codes, [D, n] float64, 0 where a dimension does not apply."""
        most = max(len(d.choices) for d in self.dimensions)
        table = np.zeros((len(self.dimensions), most + 1))  # code -1 reads the last entry, which is 0
        for column, dimension in enumerate(self.dimensions):
            table[column, : len(dimension.choices)] = dimension.choices
        return np.stack([table[column][codes[:, column]] for column in range(len(self.dimensions))])

    def legal(self, codes: Codes) -> np.ndarray:
        """Which rows are sub-networks of this space, [n] bool."""
        ok = np.ones(len(codes), bool)
        for column, dimension in enumerate(self.dimensions):
            code, applies = codes[:, column], self._applies(codes, column)
            ok &= np.where(applies, (code >= 0) & (code < len(dimension.choices)), code == ABSENT)
        chain = self.ascending
        if chain:
            values = [np.asarray(self.dimensions[c].choices)[np.clip(codes[:, c], 0, self._last(c))] for c in chain]
            for before, after in zip(values, values[1:], strict=False):
                ok &= before <= after
        return ok

    def at_least(self, codes: Codes, lower: ConfigT) -> np.ndarray:
        """Which rows are as large as `lower` in every dimension, [n] bool."""
        return (codes >= self.codes(lower)).all(1)

    def contains(self, config: Any, lower: ConfigT | None = None) -> bool:
        """Whether a configuration is a sub-network of this space (and as large as `lower` in every dimension)."""
        try:
            row = self.check(config)
        except ModelError:
            return False
        return lower is None or bool(self.at_least(row[None], lower)[0])

    def check(self, config: ConfigT) -> np.ndarray:
        """Row of codes of a sub-network of this space.

        Raises:
            ModelError: it is none; says why.
        """
        row = self.codes(config)
        values = self.values(config)
        for before, after in zip(self.ascending, self.ascending[1:], strict=False):
            if values[before] > values[after]:
                first, second = self.dimensions[before].name, self.dimensions[after].name
                raise ModelError(
                    f"{second} is {values[after]}, less than {first} with {values[before]}; widths must not decrease"
                )
        if not self.legal(row[None])[0]:
            raise ModelError(f"{config} is no sub-network of this space: a layer that is left out has values, or none")
        return row

    # -- sampling and counting ---------------------------------------------------------------------------------------

    def sample_codes(self, rng: np.random.Generator, n: int, lower: ConfigT | None = None) -> Codes:
        """Draw sub-networks: each dimension uniformly by itself, widths uniformly among those that do not decrease.

        Args:
            rng: its state decides; equal on all ranks, equal draws.
            n: how many, with repeats.
            lower: least value of every dimension.

        Returns:
            [n, D] int8.

        Raises:
            ModelError: `lower` is not of this space.
        """
        least = self._least(lower)
        uniform = rng.random((len(self.dimensions), n))
        codes = np.empty((len(self.dimensions), n), np.int8)
        cumulated = self._chain(least)
        before = np.zeros(n, np.intp)
        for column, dimension in enumerate(self.dimensions):
            if column in self.ascending:
                table = cumulated[self.ascending.index(column)]
                before = (uniform[column][:, None] >= table[before][:, :-1]).sum(1)
                codes[column] = before
                continue
            low, size = least[column], len(dimension.choices)
            codes[column] = low + (uniform[column] * (size - low)).astype(np.int8)
            codes[column][~self._applies(codes.T, column)] = ABSENT
        return np.ascontiguousarray(codes.T)

    def sample(self, rng: np.random.Generator, lower: ConfigT | None = None) -> ConfigT:
        """Draw one sub-network (see `sample_codes`)."""
        return self.config(self.sample_codes(rng, 1, lower)[0])

    def count(self, lower: ConfigT | None = None) -> int:
        """How many different sub-networks there are (that are as large as `lower` in every dimension)."""
        least = self._least(lower)
        total = self._paths(least)
        sizes = [len(d.choices) - low for d, low in zip(self.dimensions, least, strict=True)]
        deciding = {d.depth[0] for d in self.dimensions if d.depth}
        for column, dimension in enumerate(self.dimensions):
            if column in deciding:
                total *= sum(
                    int(np.prod([sizes[j] for j in self._depending(column, value)], dtype=object))
                    for value in dimension.choices[least[column] :]
                )
            elif column not in self.ascending and dimension.depth is None:
                total *= sizes[column]
        return total

    def min(self) -> ConfigT:
        """The sub-network with the least value in every dimension."""
        return self._extreme(0)

    def max(self) -> ConfigT:
        """The sub-network with the largest value in every dimension."""
        return self._extreme(-1)

    # -- prices ------------------------------------------------------------------------------------------------------

    def macs(self, config: ConfigT, formula: str = "exact") -> int:
        """MACs of one image.

        Args:
            config: of this space.
            formula: "exact", or "reference" for the published code's count where the space has one.

        Raises:
            ModelError: not of this space, or no such formula.
        """
        return int(self.macs_of(self.codes(config)[None], formula)[0])

    def params(self, config: ConfigT, position: bool = True) -> int:
        """Parameters of the extracted sub-network, with or without tables of positions."""
        return int(self.params_of(self.codes(config)[None], position)[0])

    # -- search ------------------------------------------------------------------------------------------------------

    def with_group(self, codes: Codes, group: str, source: ConfigT) -> Codes:
        """Rows with the values of one group ("widths", "depths") taken from another sub-network, for their price.

        The rows may break the rule of ascending widths. Layers that a larger depth adds repeat the values of the last
        layer that the row has.

        Raises:
            ModelError: no such group.
        """
        if group not in self.groups:
            raise ModelError(f'no group "{group}" of dimensions; allowed: {", ".join(self.groups)}')
        codes, row = codes.copy(), self.codes(source)
        for column in self.groups[group]:
            if row[column] != ABSENT:
                codes[:, column] = row[column]
        return self.settled(codes)

    def settled(self, codes: Codes) -> Codes:
        """Rows whose layers fit their depth again: those left out get -1, new ones repeat the last layer before."""
        codes = codes.copy()
        last: dict[tuple[int, str], np.ndarray] = {}
        for column in self._by_depth:
            dimension = self.dimensions[column]
            key = (dimension.depth[0], dimension.kind)
            code = codes[:, column]
            code = np.where(code < 0, last.get(key, np.zeros_like(code)), code)
            last[key] = code
            codes[:, column] = np.where(self._applies(codes, column), code, ABSENT)
        return codes

    @cached_property
    def hash(self) -> str:
        """Identity of the space, 16 hexadecimal digits: equal for equal sets of sub-networks and prices."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- inside ------------------------------------------------------------------------------------------------------

    @cached_property
    def _by_depth(self) -> tuple[int, ...]:
        """Columns that depend on a depth, in the order in which they join."""
        columns = [c for c, d in enumerate(self.dimensions) if d.depth]
        return tuple(sorted(columns, key=lambda c: (self.dimensions[c].depth[1], c)))

    def _last(self, column: int) -> int:
        return len(self.dimensions[column].choices) - 1

    def _applies(self, codes: Codes, column: int) -> np.ndarray:
        need = self.dimensions[column].depth
        if need is None:
            return np.ones(len(codes), bool)
        choices = np.asarray(self.dimensions[need[0]].choices)
        return choices[np.clip(codes[:, need[0]], 0, len(choices) - 1)] >= need[1]

    def _depending(self, column: int, value: Value) -> list[int]:
        return [j for j, d in enumerate(self.dimensions) if d.depth and d.depth[0] == column and d.depth[1] <= value]

    def _least(self, lower: ConfigT | None) -> tuple[int, ...]:
        if lower is None:
            return (0,) * len(self.dimensions)
        return tuple(max(int(code), 0) for code in self.check(lower))

    def _extreme(self, code: int) -> ConfigT:
        row = np.array([code % len(d.choices) for d in self.dimensions], np.int8)[None]
        for column in self._by_depth:
            row[~self._applies(row, column), column] = ABSENT
        return self.config(row[0])

    def _completions(self, least: tuple[int, ...]) -> list[list[int]]:
        """For each ascending column and code: how many ways there are to go on behind it."""
        ways: list[list[int]] = []
        for place in reversed(range(len(self.ascending))):
            column = self.ascending[place]
            choices = self.dimensions[column].choices
            after = self.dimensions[self.ascending[place + 1]].choices if ways else ()
            row = [
                0
                if code < least[column]
                else sum(w for v, w in zip(after, ways[0], strict=True) if v >= value)
                if ways
                else 1
                for code, value in enumerate(choices)
            ]
            ways.insert(0, row)
        return ways

    def _paths(self, least: tuple[int, ...]) -> int:
        return sum(self._completions(least)[0]) if self.ascending else 1

    def _chain(self, least: tuple[int, ...]) -> list[np.ndarray]:
        return _cumulated(self, least)


@lru_cache(maxsize=64)
def _cumulated(space: Space, least: tuple[int, ...]) -> list[np.ndarray]:
    """For each ascending column: cumulated probability of each code, by the code of the column before."""
    tables: list[np.ndarray] = []
    before: tuple[Value, ...] = (0,)
    for column, ways in zip(space.ascending, space._completions(least), strict=True):
        choices = space.dimensions[column].choices
        rows = []
        for value in before:
            weights = np.array([w if c >= value else 0 for c, w in zip(choices, ways, strict=True)], float)
            total = weights.sum()
            rows.append(np.cumsum(weights) / total if total else np.ones_like(weights))
        tables.append(np.array(rows))
        before = choices
    return tables


def strict_int(value: Any, where: str) -> int:
    """An integer of a JSON file.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where} is {json.dumps(value)}; an integer is needed")
    return value


def strict_keys(data: Any, allowed: Sequence[str], where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping with exactly these keys.

    Raises:
        ConfigError: no mapping, an unknown key or a missing one.
    """
    import difflib

    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {json.dumps(data, default=str)}; an object is needed with {', '.join(allowed)}")
    for key in data:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            raise ConfigError(f'{where}: unknown entry "{key}"; allowed: {", ".join(allowed)}.{hint}')
    missing = [key for key in allowed if key not in data and key not in optional]
    if missing:
        raise ConfigError(f'{where}: "{missing[0]}" is missing; needed: {", ".join(allowed)}')
    return dict(data)
