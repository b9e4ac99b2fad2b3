"""Latency of sub-networks: what a provider can do, MACs as one, and tables of measured blocks.

A provider has `unit`, `device`, `keys(config)` (the parts of a sub-network that it prices), `predict(config)` and
`coverage(space)`. The grammar of the keys is that of `latency_keys`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...core.errors import ConfigError
from ...core.files import write_whole
from ...core.rng import numpy_rng
from ...models.elastic import Space
from .latency_keys import block_keys

SCHEMA = 1


@dataclass(frozen=True)
class Coverage:
    """How much of a space a provider can price.

    Attributes:
        sampled: sub-networks that were drawn.
        covered: those of them that can be priced.
        missing: keys that were needed and are not known, by how many sub-networks need them.
    """

    sampled: int
    covered: int
    missing: Mapping[str, int]


class Latency(Protocol):
    """A provider. ``search.latency_from`` names a function that makes one's own ("package.module:function")."""

    unit: str
    device: str

    def keys(self, config: Any) -> list[str]:
        """The parts of a sub-network that are priced, with repeats."""
        ...

    def predict(self, config: Any) -> float:
        """Cost of a sub-network in `unit`."""
        ...

    def coverage(self, space: Space[Any]) -> Coverage:
        """How much of a space can be priced."""
        ...


class MacsCost:
    """MACs as a provider, in millions.

    Args:
        space: of the supernet.
        formula: "exact" or "reference".
    """

    unit = "M MACs"
    device = "any"

    def __init__(self, space: Space[Any], formula: str = "exact") -> None:
        self.space, self.formula = space, formula

    def keys(self, config: Any) -> list[str]:
        """There are no parts."""
        return []

    def predict(self, config: Any) -> float:
        """MACs of one image, in millions."""
        return self.space.macs(config, self.formula) / 1e6

    def coverage(self, space: Space[Any]) -> Coverage:
        """Everything."""
        return Coverage(0, 0, {})


# -- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Time of one block or network.

    Attributes:
        median: in the unit of the table.
        p10: of the runs.
        p90: of the runs.
        n: runs.
    """

    median: float
    p10: float
    p90: float
    n: int


@dataclass(frozen=True)
class LatencyTable:
    """Times of blocks on one device; the latency of a sub-network is the sum over its blocks.

    Attributes:
        device: name of the device.
        runtime: what ran the blocks, with its version.
        threads: it used; None where that is not known.
        batch: images at a time.
        dtype: of weights and activations.
        space_hash: of the space it was measured for (`Space.hash`); None for a table that serves any space with its
            keys, as the published ones do.
        entries: by key.
        unit: of the times.
        scale: by which sums are multiplied, from a comparison with whole networks (`calibrated`).
        error: mean relative error of whole networks in that comparison; None: not compared, so uncalibrated.
        rank: Spearman's correlation there.
        options: of the networks, e.g. their normalisation (`Space.options`); None where they are not known.
    """

    device: str
    runtime: str
    threads: int | None
    batch: int
    dtype: str
    space_hash: str | None
    entries: Mapping[str, Timing] = field(repr=False)
    unit: str = "ms"
    scale: float = 1.0
    error: float | None = None
    rank: float | None = None
    options: Mapping[str, Any] | None = None

    def save(self, path: Path | str) -> None:
        """Write a JSON file of schema 1; a stop in the middle leaves the one before.

        Raises:
            ConfigError: it cannot be written.
        """
        data = {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in _HEAD},
            "entries": {
                key: {"median": t.median, "p10": t.p10, "p90": t.p90, "n": t.n} for key, t in self.entries.items()
            },
        }
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error


_HEAD = ("device", "runtime", "threads", "batch", "dtype", "space_hash", "unit", "scale", "error", "rank", "options")
_OPTIONAL = ("unit", "scale", "error", "rank", "options")
_TYPES: dict[str, tuple[type, ...]] = {
    "device": (str,),
    "runtime": (str,),
    "threads": (int, type(None)),
    "batch": (int,),
    "dtype": (str,),
    "space_hash": (str, type(None)),
    "unit": (str,),
    "scale": (int, float),
    "error": (int, float, type(None)),
    "rank": (int, float, type(None)),
    "options": (dict, type(None)),
}


def _read(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _time(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{where} is {value!r}; a finite number of at least 0 is needed")
    return float(value)


def load_latency(path: Path | str) -> LatencyTable:
    """Read a table of schema 1.

    Raises:
        ConfigError: names the file and the entry that is unknown, missing or wrong.
    """
    data = _read(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"{path}: schema {found!r}; {SCHEMA} is needed (nn-Meter's tables: import_nn_meter)")
    known = {"schema", "entries", *_HEAD}
    for key in data:
        if key not in known:
            raise ConfigError(f"{path}: unknown entry {key!r}; allowed: {', '.join(sorted(known))}")
    for key in [*(key for key in _HEAD if key not in _OPTIONAL), "entries"]:
        if key not in data:
            raise ConfigError(f"{path}: {key!r} is missing")
    for key in _HEAD:
        if key in data and (isinstance(data[key], bool) or not isinstance(data[key], _TYPES[key])):
            raise ConfigError(f"{path}: {key} is {data[key]!r}")
    if not isinstance(data["entries"], dict) or not data["entries"]:
        raise ConfigError(f"{path}: entries: an object with at least one key is needed")
    entries = {}
    for key, entry in data["entries"].items():
        where = f"{path}: entries.{key}"
        if not isinstance(entry, dict) or set(entry) != {"median", "p10", "p90", "n"}:
            raise ConfigError(f"{where}: median, p10, p90 and n are needed")
        times = [_time(entry[name], f"{where}.{name}") for name in ("median", "p10", "p90")]
        if isinstance(entry["n"], bool) or not isinstance(entry["n"], int):
            raise ConfigError(f"{where}.n is {entry['n']!r}; an integer is needed")
        entries[key] = Timing(*times, entry["n"])
    return LatencyTable(entries=entries, **{key: data[key] for key in _HEAD if key in data})


def import_nn_meter(path: Path | str, device: str, runtime: str = "TFLite") -> LatencyTable:
    """Read a block table of nn-Meter: an object from keys to milliseconds, or one with such an object under "lut".

    Such tables say nothing about the device, the threads or the spread of the runs.

    Args:
        path: of the JSON file.
        device: name of the device.
        runtime: of the runs.

    Raises:
        ConfigError: another form.
    """
    data = _read(path)
    if isinstance(data, dict) and isinstance(data.get("lut"), dict):
        data = data["lut"]
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{path}: an object from keys of blocks to milliseconds is needed")
    entries = {}
    for key, value in data.items():
        time = _time(value, f"{path}: {key}")
        entries[key] = Timing(time, time, time, 0)
    return LatencyTable(device, runtime, None, 1, "float32", None, entries)


class TableLatency:
    """Latency by a table of blocks.

    Args:
        space: of the supernet.
        table: times of its blocks.
        options: of the supernet (`Space.options`); None takes any.

    Raises:
        ConfigError: the table was measured for another space, or for networks with other options.
    """

    def __init__(self, space: Space[Any], table: LatencyTable, options: Mapping[str, Any] | None = None) -> None:
        if table.space_hash not in (None, space.hash):
            raise ConfigError(
                f"the latency table of {table.device} was measured for the space {table.space_hash}, this one is "
                f"{space.hash}"
            )
        if None not in (table.options, options) and table.options != options:
            raise ConfigError(
                f"the latency table of {table.device} was measured for networks with {dict(table.options or {})}, "
                f"these have {dict(options or {})}"
            )
        self.space, self.table = space, table
        self.unit, self.device = table.unit, table.device

    def keys(self, config: Any) -> list[str]:
        """Keys of the blocks of a sub-network, with repeats."""
        return block_keys(self.space, config)

    def predict(self, config: Any) -> float:
        """Sum over the blocks.

        Raises:
            ConfigError: the table lacks a block; names its key.
        """
        entries = self.table.entries
        keys = self.keys(config)
        for key in keys:
            if key not in entries:
                hint = '; "efftrain search subnet FILE --measure_latency TABLE" measures those that are missing'
                raise ConfigError(
                    f'the latency table of {self.device} has no entry "{key}"' + hint * bool(self.table.space_hash)
                )
        return self.table.scale * math.fsum(entries[key].median for key in keys)

    def coverage(self, space: Space[Any] | None = None, sample: int = 300, seed: int = 0) -> Coverage:
        """Draw sub-networks and look which can be priced.

        Args:
            space: of the sub-networks; the provider's own if None.
            sample: how many.
            seed: of the draws.
        """
        space = space or self.space
        missing: Counter[str] = Counter()
        covered = 0
        for codes in space.sample_codes(numpy_rng(seed, "latency coverage"), sample):
            lacking = {key for key in block_keys(space, space.config(codes)) if key not in self.table.entries}
            missing.update(lacking)
            covered += not lacking
        return Coverage(sample, covered, dict(sorted(missing.items())))


# -- comparison with whole networks ----------------------------------------------------------------------------------


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values with their mean rank."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.bincount(inverse, ranks) / counts)[inverse]


def spearman(a: Any, b: Any) -> float:
    """Correlation of the ranks; 0 where one side is constant."""
    x, y = (ranks_of(np.asarray(side, float)) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def calibrated(table: LatencyTable, sums: Any, measured: Any) -> LatencyTable:
    """The table with the scale that fits whole networks best, and how well it then predicts them.

    Args:
        table: with scale 1.
        sums: [n] of the blocks of networks, with scale 1.
        measured: [n] times of these networks as a whole, in the unit of the table.

    Returns:
        A table of which `trusted` tells whether its sums may stand for whole networks.
    """
    x, y = np.asarray(sums, float), np.asarray(measured, float)
    scale = float(np.median(y / x))
    error = float(np.mean(np.abs(scale * x - y) / y))
    return replace(table, scale=scale, error=error, rank=spearman(x, y))


def trusted(table: LatencyTable, error: float = 0.15, rank: float = 0.95) -> bool:
    """Whether a table was compared with whole networks, with a mean error of at most 15 % and ranks that agree."""
    return table.error is not None and table.rank is not None and table.error <= error and table.rank >= rank
