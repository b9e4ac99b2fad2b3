"""Where images to be packed come from: folders, torchvision data sets and IDX files."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..core.errors import ShardError
from .checks import FORMATS

logger = logging.getLogger(__name__)

# Private lists of (path, label) in torchvision's file-backed data sets: names of the paths and of the labels.
_FILE_LISTS = (("_image_files", "_labels"), ("_images", "_labels"), ("_image_files", "_targets"))
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class SourceItem:
    """One image: bytes of the file, suffix without the dot, class index, and a name for reports."""

    payload: bytes
    extension: str
    label: int
    name: str


@runtime_checkable
class Source(Protocol):
    """Random access to the images of one split.

    Attributes:
        classes: class names by class index.
        min_side: smallest side in pixels that makes sense for this source.
    """

    classes: tuple[str, ...]
    min_side: int

    def __len__(self) -> int:
        """Number of images."""
        ...

    def get(self, i: int) -> SourceItem:
        """Image `i`, read anew."""
        ...

    def size(self, i: int) -> int:
        """Bytes of image `i`, as far as known without encoding it; decides where shards are cut."""
        ...

    def fingerprint(self) -> str:
        """Identity of the source; a build is only resumed where it is unchanged."""
        ...


class FolderSource:
    """A folder with one subfolder a class, as torchvision's ImageFolder reads it. File bytes are copied.

    Classes are the sorted names of the subfolders; an empty one keeps its index. Files are searched in nested folders
    too and taken by suffix (`checks.FORMATS`); others are left out and counted in a log line.
    """

    min_side = 32

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ShardError(f"{self.root}: no such folder")
        self.classes = tuple(sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir()))
        if not self.classes:
            raise ShardError(f"{self.root}: no subfolders; expected one subfolder of images for each class")
        self._files: list[tuple[str, int, int]] = []  # path below root, bytes, label
        other = 0
        for label, name in enumerate(self.classes):
            for folder, below, files in os.walk(self.root / name, followlinks=True):
                below.sort()
                for file in sorted(files):
                    if file.rpartition(".")[2].lower() not in FORMATS:
                        other += 1
                        continue
                    path = os.path.join(folder, file)
                    try:
                        size = os.path.getsize(path)
                    except OSError as error:  # a link to nowhere
                        raise ShardError(f"{path}: {error}") from error
                    self._files.append((os.path.relpath(path, self.root), size, label))
        if other:
            logger.info("%s: %d files without an image suffix are left out", self.root, other)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._files)

    def get(self, i: int) -> SourceItem:
        """Image `i`; its bytes are those of the file."""
        path, _, label = self._files[i]
        return SourceItem((self.root / path).read_bytes(), path.rpartition(".")[2], label, path)

    def size(self, i: int) -> int:
        """Bytes of the file."""
        return self._files[i][1]

    def fingerprint(self) -> str:
        """Hash of all relative paths, sizes and labels."""
        digest = hashlib.sha256()
        for entry in self._files:
            digest.update(repr(entry).encode())
        return f"folder:{digest.hexdigest()}"


class TorchvisionSource:
    """A torchvision data set (or anything that yields ``(PIL image, class index)``).

    Where the data set keeps a list of files their bytes are copied; otherwise each image is stored as PNG, without
    loss.

    Args:
        dataset: map-style data set made without a transform.
        classes: class names; by default those of the data set, or the numbers that occur.

    Raises:
        ShardError: the classes are not known.
    """

    def __init__(self, dataset: Any, classes: Sequence[str] | None = None):
        self.dataset = dataset
        self._files = _files_of(dataset)
        self.min_side = 32 if self._files else 8
        self.classes = tuple(classes) if classes is not None else _classes_of(dataset)
        data = getattr(dataset, "data", None)
        self._data = data if hasattr(data, "shape") and len(data) == len(dataset) else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def get(self, i: int) -> SourceItem:
        """Image `i`: the file's bytes, or a PNG.

        Raises:
            ShardError: the data set yields something else than a PIL image and a class index.
        """
        if self._files:
            path, label = self._files[i]
            return SourceItem(Path(path).read_bytes(), path.rpartition(".")[2], label, path)
        image, label = self.dataset[i]
        if not isinstance(image, Image.Image):
            raise ShardError(
                f"{type(self.dataset).__name__}[{i}] gives {type(image).__name__}, needed is a PIL image; "
                "make the data set without a transform"
            )
        if image.mode not in PNG_MODES:
            image = image.convert("RGB")
        return SourceItem(encode_png(image), "png", int(label), f"{type(self.dataset).__name__}/{i}")

    def size(self, i: int) -> int:
        """Bytes of the file, of the raw pixels where they are in memory, else of the PNG."""
        if self._files:
            return os.path.getsize(self._files[i][0])
        if self._data is not None:
            return int(np.prod(self._data.shape[1:]))
        return len(self.get(i).payload)

    def fingerprint(self) -> str:
        """Hash of the files' names and sizes, of the pixels in memory, or of all PNG sizes."""
        digest = hashlib.sha256(type(self.dataset).__name__.encode())
        if self._files:
            for i, (path, label) in enumerate(self._files):
                digest.update(f"{os.path.basename(path)}:{self.size(i)}:{label};".encode())
        elif self._data is not None:
            digest.update(np.ascontiguousarray(self._data).tobytes())
            digest.update(repr([int(t) for t in getattr(self.dataset, "targets", [])]).encode())
        else:
            digest.update(repr([self.size(i) for i in range(len(self))]).encode())
        return f"torchvision:{digest.hexdigest()}"


class IdxSource:
    """A pair of IDX files (MNIST family), plain or gzip; images are stored as grayscale PNG.

    The PNGs are not compressed: the pictures are a few hundred bytes, below a tar block or two, and stored bytes do
    not depend on the zlib in use, so that everyone who packs the same files gets the same shards.

    Args:
        images: IDX file of unsigned bytes, [N, H, W].
        labels: IDX file of unsigned bytes, [N].
        classes: class names; by default the numbers from 0 to the largest label.

    Raises:
        ShardError: a file is missing, is not IDX, is cut, or the counts differ.
    """

    min_side = 8

    def __init__(self, images: str | Path, labels: str | Path, classes: Sequence[str] | None = None):
        self._images = read_idx(images, dims=3)
        self._labels = read_idx(labels, dims=1)
        if len(self._images) != len(self._labels):
            raise ShardError(f"{images} holds {len(self._images)} images, {labels} {len(self._labels)} labels")
        known = int(self._labels.max()) + 1 if len(self._labels) else 0
        self.classes = tuple(classes) if classes is not None else tuple(str(c) for c in range(known))
        self._name = Path(images).name

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def get(self, i: int) -> SourceItem:
        """Image `i` as PNG."""
        payload = encode_png(Image.fromarray(self._images[i]), compress_level=0)
        return SourceItem(payload, "png", int(self._labels[i]), f"{self._name}/{i}")

    def size(self, i: int) -> int:
        """Bytes of the raw pixels and the PNG framing."""
        height, width = self._images.shape[1:]
        return height * (width + 1) + 68

    def fingerprint(self) -> str:
        """Hash of pixels and labels."""
        digest = hashlib.sha256(repr(self._images.shape).encode())
        digest.update(self._images.tobytes())
        digest.update(self._labels.tobytes())
        return f"idx:{digest.hexdigest()}"


def torchvision_source(name: str, root: str | Path, *, train: bool = True, download: bool = False) -> TorchvisionSource:
    """A data set of ``torchvision.datasets`` by class name, e.g. "CIFAR10".

    Args:
        name: class name.
        root: folder of the data set's files.
        train: training or held-out part ("test", or "val" where there is no "test").
        download: let torchvision fetch what is missing.

    Raises:
        ShardError: no such data set, or its files are not below `root`.
    """
    from torchvision import datasets

    cls = getattr(datasets, name, None)
    if not inspect.isclass(cls) or name not in datasets.__all__:
        raise ShardError(f"torchvision.datasets has no {name!r}, allowed: {', '.join(sorted(datasets.__all__))}")
    parameters = inspect.signature(cls).parameters
    options: dict[str, Any] = {"download": download} if "download" in parameters else {}
    if "train" in parameters:
        choices = [{"train": train}]
    elif "split" in parameters:
        choices = [{"split": split} for split in (("train",) if train else ("test", "val"))]
    else:
        raise ShardError(f"torchvision.datasets.{name} has no train/test split; pass the data set object in Python")
    error: Exception | None = None
    for choice in choices:
        try:
            return TorchvisionSource(cls(root, **choice, **options))
        except (ValueError, RuntimeError, FileNotFoundError) as found:
            error = error or found
    raise ShardError(f"torchvision.datasets.{name} in {root}: {error}") from error


def read_idx(path: str | Path, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzip; uint8 with `dims` dimensions.

    Raises:
        ShardError: missing, not IDX, of another type or shape, or cut.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise ShardError(f"{path}: {error}") from error
    if len(raw) < 4 + 4 * dims or raw[:2] != b"\x00\x00" or raw[2] != 8 or raw[3] != dims:
        raise ShardError(f"{path}: not an IDX file of unsigned bytes with {dims} dimensions (begins {raw[:4]!r})")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dims, 4))
    start, count = 4 + 4 * dims, int(np.prod(shape, dtype=np.int64))
    if len(raw) - start != count:
        raise ShardError(f"{path}: {len(raw) - start} bytes of data, {' x '.join(map(str, shape))} need {count}")
    return np.frombuffer(raw, np.uint8, count, start).reshape(shape)


def encode_png(image: Image.Image, compress_level: int = 6) -> bytes:
    """PNG bytes of a PIL image."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="PNG", compress_level=compress_level)
        return buffer.getvalue()


def _files_of(dataset: Any) -> list[tuple[str, int]]:
    """(path, class index) of every image where the data set lists files, else []."""
    for name in ("samples", "_samples"):
        found = getattr(dataset, name, None)
        if isinstance(found, list) and len(found) == len(dataset) and found and _is_file(found[0][0]):
            return [(str(path), int(label)) for path, label in found]
    for images, labels in _FILE_LISTS:
        paths, targets = getattr(dataset, images, None), getattr(dataset, labels, None)
        if isinstance(paths, list) and targets is not None and len(paths) == len(targets) == len(dataset) and paths:
            if _is_file(paths[0]):
                return [(str(path), int(label)) for path, label in zip(paths, targets, strict=True)]
    return []


def _is_file(path: object) -> bool:
    return isinstance(path, (str, Path)) and os.path.isfile(path)


def _classes_of(dataset: Any) -> tuple[str, ...]:
    for name in ("classes", "categories"):
        found = getattr(dataset, name, None)
        if isinstance(found, (list, tuple)) and found:
            # ImageNet lists several synonyms for a class; the first one names it
            return tuple(c if isinstance(c, str) else str(c[0]) for c in found)
    for name in ("targets", "labels", "_labels"):
        found = getattr(dataset, name, None)
        if found is not None and len(found):
            return tuple(str(c) for c in range(int(max(found)) + 1))
    raise ShardError(f"{type(dataset).__name__} does not name its classes; pass classes=...")
