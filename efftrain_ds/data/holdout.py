"""A part of every class of the training shards held out from training, e.g. to choose a schedule without the test set.

The shards stay as they are: both parts are the same manifest with other rows left out. Which samples are held out is a
function of (seed, class, place in the class), so it is the same on every rank and machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from pydantic import Field, model_validator

from ..core.draws import words
from ..core.errors import ShardError
from ..core.strict import StrictModel
from .manifest import Manifest

KEY = "efftrain.data.hold_out"
DEFAULT_SHARE = 0.1


class HoldOutConfig(StrictModel):
    """A part of each class of the training shards that is evaluated on and not trained on."""

    share: float | None = Field(None, gt=0, lt=1)
    """Share of each class, rounded, at least one sample; null = 0.1 unless `per_class` is given."""
    per_class: int | None = Field(None, ge=1)
    """Samples of each class instead of a share."""
    train_share: float = Field(1.0, gt=0, le=1)
    """Share of the other samples of each class that is trained on, at least one; 1 = all of them."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""

    @model_validator(mode="after")
    def _one_size(self) -> HoldOutConfig:
        if self.share is not None and self.per_class is not None:
            raise ValueError('give "share" or "per_class", not both')
        return self

    def held(self, n: int) -> int:
        """Samples held out of a class of `n`."""
        if self.per_class is not None:
            return self.per_class
        return max(1, round((DEFAULT_SHARE if self.share is None else self.share) * n))

    def text(self) -> str:
        """In a few words."""
        if self.per_class is not None:
            return f"{self.per_class} of each class"
        return f"{100 * (DEFAULT_SHARE if self.share is None else self.share):g}% of each class"


@dataclass(frozen=True)
class LeftOut:
    """Rows of an index that take no part.

    Attributes:
        name: says which, as part of the data set's identity.
        rows: ascending, [n] int64.
    """

    name: str
    rows: np.ndarray = field(compare=False, repr=False)


def hold_out(manifest: Manifest, config: HoldOutConfig, key: str = KEY) -> tuple[Manifest, Manifest]:
    """Divide a split into what is trained on and what is held out of it.

    Samples whose label is no class are trained on, where they are counted as bad; they are never held out.

    Args:
        manifest: the split, its label map applied.
        config: how much is held out.
        key: configuration key, for messages.

    Returns:
        (training part, held-out part), which differ from `manifest` in the rows they leave out.

    Raises:
        ShardError: a class has too few samples, or there are no labels.
    """
    identity = f"hold_out {config.model_dump_json()}"
    trained, held = _parts(manifest, config, key)
    return (
        replace(manifest, excluded=LeftOut(f"{identity} train", trained)),
        replace(manifest, excluded=LeftOut(f"{identity} held", held)),
    )


_CACHE: OrderedDict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = OrderedDict()
_KEPT = 2


def _parts(manifest: Manifest, config: HoldOutConfig, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows that the training part and the held-out part leave out; the last draws are kept, as a run asks again."""
    place = (manifest.digest, config.model_dump_json())
    if place not in _CACHE:
        _CACHE[place] = _draw(manifest, config, key)
        while len(_CACHE) > _KEPT:
            _CACHE.popitem(last=False)
    return _CACHE[place]


def _draw(manifest: Manifest, config: HoldOutConfig, key: str) -> tuple[np.ndarray, np.ndarray]:
    labels = np.concatenate([np.empty(0, np.int32), *_labels(manifest)])
    use = np.ones(len(labels), dtype=np.int8)  # 0 not used, 1 trained on, 2 held out
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]  # without those of no class
    kinds, starts = np.unique(labels[order], return_index=True)
    ends = np.append(starts, len(order))[1:]
    if not len(kinds):
        raise ShardError(f"{key}: {manifest.folder} has no labelled samples to hold out")
    small: list[str] = []
    for label, start, end in zip(kinds.tolist(), starts.tolist(), ends.tolist(), strict=True):
        n = end - start
        held = config.held(n)
        if held >= n:
            small.append(f"{_name(manifest, label)} ({n})")
            continue
        rows = order[start:end][
            np.argsort(words(config.seed, f"hold_out/{label}", np.arange(n), 1)[:, 0], kind="stable")
        ]
        kept = max(1, round(config.train_share * (n - held)))
        use[rows[:held]] = 2
        use[rows[held + kept :]] = 0
    if small:
        least = f"{config.per_class}" if config.per_class is not None else "at least 1"
        shown = ", ".join(small[:3]) + (", ..." if len(small) > 3 else "")
        raise ShardError(
            f"{key}: {least} sample{'s' * (config.per_class not in (None, 1))} of each class would be held out and "
            f"nothing left to train on in {len(small)} of {len(kinds)} classes of {manifest.folder}: {shown}; give a "
            "smaller number, or leave these classes out"
        )
    return np.flatnonzero(use != 1), np.flatnonzero(use != 2)


def _labels(manifest: Manifest) -> Iterator[np.ndarray]:
    """Class of every row, piece after piece; -1 = none."""
    count = len(manifest.classes) or None
    for rows in manifest.pieces():
        labels = manifest.labels_of(rows)
        wrong = labels < 0 if count is None else (labels < 0) | (labels >= count)
        yield np.where(wrong, -1, labels).astype(np.int32)


def _name(manifest: Manifest, label: int) -> str:
    return manifest.classes[label] if label < len(manifest.classes) else f"class {label}"
