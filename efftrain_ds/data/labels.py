"""Label sets of ImageNet's variants, and maps between them: by synset, never by position.

A synset is WordNet's identifier of a class, e.g. ``n01440764``. The lists are those that timm ships; nothing is copied
here, so an index means what it means in timm's weights. A map is applied to a manifest (`apply_labels`): the shards
stay as they are, every sample gets the index of its class in the target set, and samples without one can be left out of
the plan before training.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ..core.errors import ConfigError
from .manifest import Manifest

_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class _Known:
    file: str
    count: int
    about: str


_KNOWN = {
    "imagenet-1k": _Known("imagenet_synsets.txt", 1000, "ILSVRC 2012"),
    "imagenet-12k": _Known("imagenet12k_synsets.txt", 11821, "timm's subset of the fall 2011 release"),
    "imagenet-22k": _Known("imagenet22k_synsets.txt", 21841, "fall 2011 release"),
    "imagenet-21k-goog": _Known("imagenet21k_goog_synsets.txt", 21843, "Google's; two synsets more than fall 2011"),
    "imagenet-22k-ms": _Known("imagenet22k_ms_synsets.txt", 21842, "ILSVRC's 1,000 first, then the rest"),
    "imagenet-21k-miil": _Known("imagenet21k_miil_synsets.txt", 11221, "ImageNet-21K-P of fall 2011"),
    "imagenet-21k-miil-w21": _Known("imagenet21k_miil_w21_synsets.txt", 10450, "ImageNet-21K-P of winter 2021"),
}
_AMBIGUOUS = ("imagenet-21k", "imagenet-21k-p", "imagenet21k", "in21k", "fall11", "winter21", "winter-21", "imagenet")


@dataclass(frozen=True)
class LabelSet:
    """Classes in the order of their indices.

    Attributes:
        name: name of a set, or the file it was read from.
        synsets: distinct names of the classes; of ImageNet's sets their synsets.
    """

    name: str
    synsets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.synsets)

    @cached_property
    def index(self) -> dict[str, int]:
        """Index of each class."""
        return {synset: i for i, synset in enumerate(self.synsets)}


@dataclass(frozen=True)
class LabelMap:
    """From the class indices of shards to those of a label set.

    Attributes:
        target: name of the label set.
        classes: its classes.
        indices: index in the target of every class of the shards, -1 = not there.
    """

    target: str
    classes: tuple[str, ...]
    indices: tuple[int, ...]

    @cached_property
    def array(self) -> np.ndarray:
        """`indices` as an array, [classes of the shards] int64."""
        return np.asarray(self.indices, dtype=np.int64)

    @property
    def drops(self) -> bool:
        """Whether some class of the shards is left out."""
        return bool((self.array < 0).any())

    @cached_property
    def digest(self) -> str:
        """Identity of the map."""
        hasher = hashlib.sha256("\n".join(self.classes).encode())
        hasher.update(self.array.astype("<i8").tobytes())
        return hasher.hexdigest()

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Mapped labels; -1 for classes that are left out, and for numbers that are no class of the shards.

        Args:
            labels: class indices as in the shards, any shape.

        Returns:
            int64 of the same shape.
        """
        labels = np.asarray(labels, dtype=np.int64)
        known = (labels >= 0) & (labels < len(self.indices))
        return np.where(known, self.array[np.where(known, labels, 0)], -1)


def label_sets() -> dict[str, tuple[int, str]]:
    """Number of classes and origin of every named label set."""
    return {name: (known.count, known.about) for name, known in _KNOWN.items()}


def label_set(name: str, key: str = "label set") -> LabelSet:
    """A named label set, or one from a text file with one class a line.

    Args:
        name: a name of `label_sets`, its number of classes ("21841"), or the path of a file (it has a "/" or ends in
            ".txt").
        key: configuration key, for messages.

    Raises:
        ConfigError: the name is unknown or ambiguous, or the file is missing, empty or names a class twice.
    """
    if "/" in name or name.endswith(".txt"):
        return _from_file(Path(name), key)
    by_count = {str(known.count): label for label, known in _KNOWN.items()}
    found = by_count.get(name, name)
    if found in _KNOWN:
        return LabelSet(found, _shipped(_KNOWN[found]))
    allowed = ", ".join(f"{label} ({known.count})" for label, known in _KNOWN.items())
    if name.lower() in _AMBIGUOUS:
        raise ConfigError(f'{key}: "{name}" names several label sets; say which one: {allowed}')
    close = difflib.get_close_matches(name, list(_KNOWN), n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    raise ConfigError(
        f'{key}: unknown label set "{name}".{hint} Allowed: {allowed}, or a text file with one class a line'
    )


@lru_cache(maxsize=16)
def _shipped(known: _Known) -> tuple[str, ...]:
    """A list of timm's; found without importing timm, which takes seconds.

    Raises:
        ConfigError: this timm does not have it, or another one.
    """
    spec = importlib.util.find_spec("timm")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = Path(folders[0]) / "data" / "_info" / known.file if folders else Path(known.file)
    if not path.is_file():
        raise ConfigError(f"{path}: missing; the label sets are those of timm >= 1.0.30")
    synsets = tuple(path.read_text().split())
    if len(synsets) != known.count or len(set(synsets)) != known.count:
        raise ConfigError(f"{path}: {len(synsets)} synsets, expected {known.count} different ones")
    return synsets


def _from_file(path: Path, key: str) -> LabelSet:
    if not path.is_file():
        raise ConfigError(f"{key}: {path}: no such file; a label set is a text file with one class a line")
    classes = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    twice = sorted(c for c in set(classes) if classes.count(c) > 1) if len(set(classes)) < len(classes) else []
    if not classes or twice:
        raise ConfigError(f"{key}: {path}: {'no classes' if not classes else f'{twice[0]} is there more than once'}")
    return LabelSet(str(path), classes)


def positions_of(classes: Sequence[str], where: LabelSet) -> np.ndarray:
    """Index in `where` of each of `classes`, -1 = not there, [len(classes)] int64."""
    index = where.index
    return np.asarray([index.get(name, -1) for name in classes], dtype=np.int64)


def make_map(
    classes: Sequence[str],
    target: LabelSet,
    *,
    missing: str = "error",
    key: str = "label map",
    whose: str = "shards",
    source_key: str = "source",
    missing_key: str = "missing",
) -> LabelMap:
    """The map from classes in the order of the shards' indices to a label set.

    Args:
        classes: names of the shards' classes.
        target: where they go.
        missing: "error", or "drop" to leave classes out that the target does not have.
        key: configuration key, for messages.
        whose: what has the classes, for messages.
        source_key: name under `key` of the label set of the indices, for messages.
        missing_key: name under `key` of `missing`, for messages.

    Raises:
        ConfigError: a class is not in the target (with "error"), none is, or one is there twice.
    """
    positions = positions_of(classes, target)
    absent = [name for name, position in zip(classes, positions.tolist(), strict=True) if position < 0]
    if len(absent) == len(classes):
        synsets = any(_SYNSET.fullmatch(name) for name in classes)
        hint = "" if synsets else f"; is {source_key} the label set of the indices?"
        raise ConfigError(f"{key}: no class of {whose} ({_few(classes)}) is in {target.name}{hint}")
    if absent and missing == "error":
        raise ConfigError(
            f"{key}: {len(absent)} of {len(classes)} classes of {whose} are not in {target.name} ({_few(absent)}); "
            f'{missing_key} = "drop" leaves their samples out'
        )
    present = positions[positions >= 0]
    if len(np.unique(present)) != len(present):
        raise ConfigError(f"{key}: {whose}: two classes have one name")
    return LabelMap(target.name, target.synsets, tuple(positions.tolist()))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def apply_labels(
    manifest: Manifest,
    *,
    target: str,
    source: str | None = None,
    missing: str = "error",
    key: str = "efftrain.data.labels",
    source_key: str = "source",
    missing_key: str = "missing",
) -> Manifest:
    """The same data set with the classes of a label set; its digest tells it apart.

    Args:
        manifest: the shards.
        target: label set to train with, see `label_set`.
        source: label set of the shards' indices; None takes the manifest's class names for synsets.
        missing: see `make_map`.
        key: configuration key, for messages.
        source_key: name of `source` under `key`, for messages.
        missing_key: name of `missing` under `key`, for messages.

    Raises:
        ConfigError: unknown label set, the counts of classes disagree, or classes are missing.
    """
    goal = label_set(target, f"{key}.target")
    classes: Sequence[str] = manifest.classes
    if source is not None:
        given = label_set(source, f"{key}.{source_key}")
        if classes and len(classes) != len(given):
            raise ConfigError(
                f"{key}.{source_key}: {given.name} has {len(given)} classes, {manifest.folder} has {len(classes)}"
            )
        classes = given.synsets
    if not classes:
        raise ConfigError(
            f"{key}.{source_key}: {manifest.folder} has no class names; say which label set its indices are of"
        )
    found = make_map(
        classes,
        goal,
        missing=missing,
        key=key,
        whose=str(manifest.folder),
        source_key=source_key,
        missing_key=missing_key,
    )
    return replace(manifest, classes=goal.synsets, labels=found)
