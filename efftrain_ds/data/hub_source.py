"""Data sets of Hugging Face ``datasets`` (extra "hf"), saved to disk or by name; encoded images are copied."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import ShardError
from .checks import image_format
from .sources import PNG_MODES, SourceItem, encode_png

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_BATCH = 1000


class HubSource:
    """One split of a map-style data set.

    Bytes that the image column holds (or the file it names) are copied; a picture in a format that shards do not take
    is stored as PNG, without loss. Class names are those of the label column's ClassLabel, else the numbers from 0.

    Args:
        dataset: a ``datasets.Dataset``.
        image: image column; None takes the only one of type Image.
        label: label column; None takes the only one of type ClassLabel, else an integer column of a usual name.

    Raises:
        ShardError: no such column, a column of another type, several to choose from, or rows without a label.
    """

    min_side = 8

    def __init__(self, dataset: Any, image: str | None = None, label: str | None = None):
        datasets = _library()
        if not isinstance(dataset, datasets.Dataset):
            raise ShardError(f"{type(dataset).__name__}: needed is one split, a datasets.Dataset (not streamed)")
        columns = dataset.features
        self._image = _column(columns, image, "image", lambda f: isinstance(f, datasets.Image))
        self._label = _column(columns, label, "label", lambda f: isinstance(f, datasets.ClassLabel), _LABEL_NAMES)
        kind = columns[self._label]
        if not isinstance(kind, datasets.ClassLabel) and not _is_integer(kind):
            raise ShardError(f"column {self._label!r} is {_words(kind)}, a label is a ClassLabel or an integer")
        self._name = str(dataset.info.dataset_name or "dataset")
        self._data = dataset.cast_column(self._image, datasets.Image(decode=False))
        self._labels, self._sizes = self._read_columns()
        if isinstance(kind, datasets.ClassLabel):
            self.classes = tuple(kind.names)
        else:
            self.classes = tuple(str(i) for i in range(int(self._labels.max(initial=-1)) + 1))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._labels)

    def get(self, i: int) -> SourceItem:
        """Row `i`."""
        cell = self._data[i][self._image]
        name = f"{self._name}/{i}"
        if cell is None:
            return SourceItem(b"", "png", int(self._labels[i]), name)
        payload = cell.get("bytes")
        if payload is None:
            payload = Path(cell["path"]).read_bytes()
        kind = image_format(payload)
        if kind is None and payload:
            payload, kind = _as_png(payload), "png"
        return SourceItem(payload, kind or "png", int(self._labels[i]), name)

    def size(self, i: int) -> int:
        """Bytes of the encoded image."""
        return int(self._sizes[i])

    def fingerprint(self) -> str:
        """Hash of columns, labels and sizes."""
        digest = hashlib.sha256(repr((self._image, self._label, self.classes)).encode())
        digest.update(self._labels.tobytes())
        digest.update(self._sizes.tobytes())
        return f"hf:{digest.hexdigest()}"

    def _read_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """(labels, sizes of the encoded images), both [N] int64, without reading an image."""
        import pyarrow.compute as pc

        labels, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        table = self._data.select_columns([self._image, self._label]).with_format("arrow")
        for start in range(0, len(self._data), _BATCH):
            rows = table[start : start + _BATCH]
            column = rows.column(self._label)
            if column.null_count:
                row = start + int(np.flatnonzero(column.is_null().to_numpy())[0])
                raise ShardError(f"column {self._label!r}: row {row} has no label")
            labels.append(column.to_numpy().astype(np.int64))
            cells = rows.column(self._image)
            length = pc.fill_null(pc.binary_length(pc.struct_field(cells, "bytes")), -1).to_numpy().astype(np.int64)
            if (length < 0).any():
                paths = pc.struct_field(cells, "path").to_pylist()
                length = np.array([_file_size(p) if n < 0 else n for n, p in zip(length, paths, strict=True)])
            sizes.append(length)
        return np.concatenate(labels), np.concatenate(sizes)


def hub_source(
    where: str,
    *,
    split: str = "train",
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> HubSource:
    """A data set that ``save_to_disk`` wrote, or one by its name on the hub (or of a local loading folder).

    Args:
        where: folder or name.
        split: split to take, where there are several.
        config: configuration of a data set that has several.
        image: image column, see `HubSource`.
        label: label column, see `HubSource`.

    Raises:
        ShardError: ``datasets`` is not installed, or no such data set, split or column.
    """
    datasets = _library()
    try:
        if Path(where).is_dir() and any((Path(where) / n).is_file() for n in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(where)
        else:
            found = datasets.load_dataset(where, config, split=split)
    except Exception as error:  # the library raises whatever its loaders, the hub and the network raise
        raise ShardError(f"{where}: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if split not in found:
            raise ShardError(f"{where}: no split {split!r}, there are: {', '.join(map(str, found))}")
        found = found[split]
    return HubSource(found, image, label)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ShardError(f"Hugging Face data sets need: pip install 'efftrain-ds[hf]' ({error})") from error
    return datasets


def _column(columns: Any, given: str | None, what: str, fits: Any, names: tuple[str, ...] = ()) -> str:
    """The column that was named, or the only one that fits, or an integer one of a usual name."""
    known = ", ".join(f"{name} ({_words(kind)})" for name, kind in columns.items())
    if given is not None:
        if given not in columns:
            raise ShardError(f"no column {given!r}; there are: {known}")
        if what == "image" and not fits(columns[given]):
            raise ShardError(f"column {given!r} is {_words(columns[given])}, not Image")
        return given
    found = [name for name, kind in columns.items() if fits(kind)]
    found = found or [name for name in names if name in columns and _is_integer(columns[name])][:1]
    if len(found) != 1:
        several = f"several {what} columns" if found else f"no {what} column found"
        raise ShardError(f"{several}; name one with --{what}-column; there are: {known}")
    return found[0]


def _is_integer(kind: Any) -> bool:
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint"))


def _words(kind: Any) -> str:
    name = type(kind).__name__
    return str(kind.dtype) if name == "Value" else name


def _file_size(path: str | None) -> int:
    return os.path.getsize(path) if path else 0


def _as_png(payload: bytes) -> bytes:
    """PNG of a picture in any format that Pillow reads; bytes that it does not read are returned for the check."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return encode_png(image if image.mode in PNG_MODES else image.convert("RGB"))
    except Exception:
        return payload
