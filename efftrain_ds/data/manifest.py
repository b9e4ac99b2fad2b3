"""Identity of a data set: ``manifest.json`` and the memory-mapped sample table ``index.bin``.

A row of the table points at the payload of one sample inside an uncompressed tar shard, so that a sample is read
with one positioned read and no tar parsing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..core.errors import ShardError
from ..core.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .holdout import LeftOut
    from .labels import LabelMap

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.bin"
_PIECE = 1 << 20  # rows of the index read at a time, 25 MB
ROW = np.dtype(
    [
        ("shard", "<u4"),  # row of Manifest.shards
        ("offset", "<u8"),  # first byte of the image payload in the tar file
        ("size", "<u4"),  # bytes of the image payload
        ("label", "<i4"),  # source class index
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)


_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file: name relative to the manifest, size in bytes, SHA-256 in hex, number of samples."""

    name: str
    bytes: int
    sha256: str
    n: int


@dataclass(frozen=True)
class Rendition:
    """How the images were made smaller before they were packed.

    Attributes:
        short_side: pixels; images with a larger short side were resized to it, the others were copied.
        quality: JPEG quality of the resized images.
        encoder: what resized and encoded them, with versions.
    """

    short_side: int
    quality: int
    encoder: str


class ShardStore(Protocol):
    """Where the files of shards lie that are not beside the manifest."""

    def path(self, shard: Shard) -> Path:
        """Local path of a shard, whether it is there or not."""
        ...


@dataclass(frozen=True)
class Manifest:
    """A split of a data set packed into shards; rows of the table are grouped by shard, in shard order.

    Attributes:
        folder: local folder of the manifest and the index, and of the shards unless there is a `store`.
        split: name of the split.
        classes: class names by class index.
        shards: the tar files.
        samples: rows of the index.
        index_sha256: SHA-256 of the index in hex.
        rendition: how images were made smaller; None = source bytes.
        store: local copies of remote shards; no part of the identity.
        labels: map of the index's labels to `classes`, see `labels.apply_labels`; None = they are class indices.
        excluded: further rows that take no part, see `holdout.hold_out`.
    """

    folder: Path
    split: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: int
    index_sha256: str
    rendition: Rendition | None = None
    store: ShardStore | None = field(default=None, compare=False)
    labels: LabelMap | None = None
    excluded: LeftOut | None = None

    @cached_property
    def digest(self) -> str:
        """Identity of the data set: hash of everything but the places of the files."""
        document = self._document()
        if self.labels is not None:
            document["labels"] = self.labels.digest
        if self.excluded is not None:
            document["excluded"] = self.excluded.name
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @cached_property
    def left_out(self) -> np.ndarray:
        """Rows of the index that take no part, ascending, [n] int64: those whose class `labels` leaves out, `excluded`.

        Labels that are no class at all are kept: they are bad samples, which a run counts and reports.
        """
        rows = self._without_class()
        return rows if self.excluded is None else np.union1d(rows, self.excluded.rows)

    def _without_class(self) -> np.ndarray:
        if self.labels is None or not self.labels.drops:
            return np.empty(0, np.int64)
        kinds = np.asarray(self.labels.indices, np.int64)
        found, first = [np.empty(0, np.int64)], 0
        for rows in self.pieces():
            labels = rows["label"].astype(np.int64)
            known = (labels >= 0) & (labels < len(kinds))
            found.append(first + np.flatnonzero(known & (kinds[np.where(known, labels, 0)] < 0)))
            first += len(rows)
        return np.concatenate(found)

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows of the table, a million at a time.

        The file is read and not mapped, so that all of it never counts as this process's memory.

        Raises:
            ShardError: as for `table`.
        """
        assert self.table is not None  # compares the size of the file
        with (self.folder / INDEX).open("rb") as stream:
            while len(rows := np.fromfile(stream, ROW, _PIECE)):
                yield rows

    @property
    def kept(self) -> int:
        """Samples that take part: all but those that `labels` and `excluded` leave out."""
        return self.samples - len(self.left_out)

    @cached_property
    def table(self) -> np.ndarray:
        """Memory-mapped rows of dtype `ROW`, [samples].

        Raises:
            ShardError: the file is missing or has another length than the manifest says.
        """
        path = self.folder / INDEX
        expected = self.samples * ROW.itemsize
        found = path.stat().st_size if path.is_file() else -1
        if found != expected:
            what = "missing" if found < 0 else f"{found} bytes"
            raise ShardError(
                f"{path}: {what}, {self.samples} samples need {expected} bytes; run: efftrain shards audit"
            )
        if self.samples == 0:
            return np.empty(0, ROW)
        return np.memmap(path, dtype=ROW, mode="r")

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """First row of each shard and the total at the end, [shards + 1] int64."""
        return np.concatenate([[0], np.cumsum([s.n for s in self.shards], dtype=np.int64)]).astype(np.int64)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """Class indices of rows of the table, mapped where there is a map (-1 = no class), [n] int64."""
        labels = rows["label"].astype(np.int64)
        return labels if self.labels is None else self.labels.apply(labels)

    def shard_path(self, shard: int) -> Path:
        """Local path of shard number `shard`."""
        if self.store is not None:
            return self.store.path(self.shards[shard])
        return self.folder / self.shards[shard].name

    def _document(self) -> dict[str, Any]:
        document = {
            "format": FORMAT,
            "split": self.split,
            "samples": self.samples,
            "classes": list(self.classes),
            "index_sha256": self.index_sha256,
            "shards": [asdict(s) for s in self.shards],
        }
        if self.rendition is not None:  # left out otherwise: data sets without one keep their digest
            document["rendition"] = asdict(self.rendition)
        return document

    def write(self) -> Path:
        """Write ``manifest.json`` atomically, without `labels` and `excluded` (of a run); returns its path."""
        assert self.labels is None
        assert self.excluded is None
        path = self.folder / MANIFEST
        write_whole(path, json.dumps(self._document(), indent=1) + "\n")
        return path


def load_manifest(where: str | Path) -> Manifest:
    """Read the manifest of a shard folder (or the path of the manifest itself).

    Raises:
        ShardError: no manifest there, not JSON, another format version, or counts that do not add up.
    """
    path = Path(where)
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise ShardError(f"{where}: no {MANIFEST} there; make shards with: efftrain shards build")
    try:
        document = json.loads(path.read_text())
        version = document["format"]
        if version != FORMAT:
            raise ShardError(f"{path}: format {version}, this version reads format {FORMAT}")
        manifest = Manifest(
            folder=path.parent,
            split=document["split"],
            classes=tuple(document["classes"]),
            shards=tuple(Shard(**shard) for shard in document["shards"]),
            samples=document["samples"],
            index_sha256=document["index_sha256"],
            rendition=Rendition(**document["rendition"]) if "rendition" in document else None,
        )
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: not a shard manifest ({type(error).__name__}: {error})") from error
    for shard in manifest.shards:
        sound = isinstance(shard.name, str) and shard.name == os.path.basename(shard.name) not in ("", ".", "..")
        counts = all(isinstance(v, int) and v >= 0 for v in (shard.n, shard.bytes))
        if not (sound and counts and isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
            raise ShardError(
                f"{path}: shard {shard.name!r}: needed are a plain file name, counts of bytes and samples, and a "
                "SHA-256 of 64 hex digits"
            )
    total = sum(s.n for s in manifest.shards)
    if total != manifest.samples:
        raise ShardError(f"{path}: the shards hold {total} samples, the manifest says {manifest.samples}")
    return manifest
