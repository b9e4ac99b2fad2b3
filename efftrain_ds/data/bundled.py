"""Real images that come with the package, so that the example job and the tests need no download."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..core.errors import ShardError
from .build import build_shards
from .manifest import MANIFEST, load_manifest
from .sources import IdxSource

PREFIX = "bundled:"
CACHE_VARIABLE = "EFFTRAIN_CACHE"
_SAMPLES_PER_SHARD = 1000
_FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class _Part:
    """One split: data set, split, number of samples, class names."""

    data_set: str
    split: str
    samples: int
    classes: tuple[str, ...]


_PARTS = {
    f"{PREFIX}{part.data_set}/{part.split}": part
    for part in (
        _Part("fashion_mnist", "train", 6000, _FASHION_MNIST),
        _Part("fashion_mnist", "val", 2000, _FASHION_MNIST),
    )
}


def _part(path: str | Path) -> _Part | None:
    text = str(path)
    if not text.startswith(PREFIX):
        return None
    if text not in _PARTS:
        raise ShardError(f"{text!r}: no such bundled data, allowed: {', '.join(_PARTS)}")
    return _PARTS[text]


def samples(path: str | Path) -> int | None:
    """Number of samples of a bundled split, without packing it; None where `path` names no bundled data.

    Raises:
        ShardError: unknown bundled name.
    """
    part = _part(path)
    return part.samples if part is not None else None


def classes(path: str | Path) -> tuple[str, ...] | None:
    """Class names of a bundled split, without packing it; None where `path` names no bundled data.

    Raises:
        ShardError: unknown bundled name.
    """
    part = _part(path)
    return part.classes if part is not None else None


def source(path: str | Path) -> IdxSource:
    """The images of a bundled split.

    Raises:
        ShardError: unknown bundled name.
    """
    part = _part(path)
    if part is None:
        raise ShardError(f"{str(path)!r}: no bundled data, allowed: {', '.join(_PARTS)}")
    root = resources.files(f"{__package__}.samples") / part.data_set
    with (
        resources.as_file(root / f"{part.split}-images-idx3-ubyte.gz") as images,
        resources.as_file(root / f"{part.split}-labels-idx1-ubyte.gz") as labels,
    ):
        return IdxSource(images, labels, part.classes)


def resolve(path: str, *, cache: Path | None = None) -> Path:
    """Shard folder for a data path of the configuration.

    ``"bundled:fashion_mnist/train"`` (or ``/val``) is packed on first use; any other string is returned as a path.
    Safe when several processes ask at once: one packs, the others wait for it.

    Args:
        path: value of ``data.train`` or ``data.val``.
        cache: folder to pack into; None takes ``$EFFTRAIN_CACHE``, else ``shards`` in the current folder.

    Raises:
        ShardError: unknown bundled name, or the folder holds something else.
    """
    part = _part(path)
    if part is None:
        return Path(path)
    root = Path(cache or os.environ.get(CACHE_VARIABLE) or "shards") / part.data_set
    folder = root / part.split
    if _ready(folder, part):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{part.split}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _ready(folder, part):  # another process may have packed it while this one waited
                build_shards(source(path), folder, split=part.split, samples_per_shard=_SAMPLES_PER_SHARD)
    except OSError as error:
        raise ShardError(f"{root}: cannot be written ({error}); name another folder with {CACHE_VARIABLE}") from error
    return folder


def _ready(folder: Path, part: _Part) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = load_manifest(folder)
    if (manifest.samples, manifest.classes) != (part.samples, part.classes):
        raise ShardError(f"{folder}: holds {manifest.samples} samples of other data; remove that folder")
    return True
