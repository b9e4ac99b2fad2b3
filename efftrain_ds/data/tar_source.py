"""Classes as tar files: ImageNet's own form, read by position and never unpacked.

Either one outer archive whose members are a tar file for each class (``ILSVRC2012_img_train.tar``), or a folder of such
files (``n01440764.tar``, ..., the unpacked form of the 21,841-class release). The headers are scanned once; after that
every image is one positioned read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..core.errors import ShardError
from .checks import FORMATS
from .sources import SourceItem
from .tarwalk import Window, walk

logger = logging.getLogger(__name__)

_SUFFIXES = tuple(FORMATS)
_ITEM = np.dtype([("file", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("suffix", "u1")])
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarClassSource:
    """Images of an archive of class archives, or of a folder of class archives.

    Classes are the sorted stems of the class archives' names; one without images keeps its index. Members are taken by
    suffix (`checks.FORMATS`); others are left out and counted in a log line. An image's name in reports is
    ``CLASS.tar#OFFSET``, the offset being that of its bytes in the outermost file.

    Args:
        path: outer archive, or folder of ``*.tar`` files (not searched in subfolders).

    Raises:
        ShardError: nothing of that form there, a compressed archive, two archives of one class, or an archive that is
            cut or damaged; the text names the file, the class and the offset.
    """

    min_side = 32

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self._files = sorted(self.path.glob("*.tar"))
            if not self._files:
                raise ShardError(f"{self.path}: no *.tar files there; expected one tar file for each class")
            archives = [(file.stem, i, 0, None) for i, file in enumerate(self._files)]
        elif self.path.is_file():
            self._files = [self.path]
            archives = list(self._inner())
            if not archives:
                raise ShardError(f"{self.path}: holds no tar files; expected one for each class (or name their folder)")
        else:
            raise ShardError(f"{self.path}: no such file or folder")
        archives.sort()
        self.classes = tuple(stem for stem, *_ in archives)
        for stem, following in zip(self.classes, self.classes[1:], strict=False):
            if stem == following:
                raise ShardError(f"{self.path}: two tar files for the class {stem}")
        self._other = 0
        parts = [self._scan(label, *archive) for label, archive in enumerate(archives)]
        self._items = np.concatenate(parts)
        if self._other:
            logger.info("%s: %d members without an image suffix are left out", self.path, self._other)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def get(self, i: int) -> SourceItem:
        """Image `i`; its bytes are those of the member."""
        item = self._items[i]
        path, offset, size = self._files[item["file"]], int(item["offset"]), int(item["size"])
        with path.open("rb") as file:
            payload = os.pread(file.fileno(), size, offset)
        if len(payload) != size:
            raise ShardError(f"{path}: offset {offset}: {len(payload)} bytes read, the member has {size}")
        name = f"{self.classes[item['label']]}.tar#{offset}"
        return SourceItem(payload, _SUFFIXES[item["suffix"]], int(item["label"]), name)

    def size(self, i: int) -> int:
        """Bytes of the member."""
        return int(self._items["size"][i])

    def fingerprint(self) -> str:
        """Hash of the classes and of every member's place and size."""
        digest = hashlib.sha256(repr((self.classes, [file.name for file in self._files])).encode())
        digest.update(self._items.tobytes())
        return f"tar:{digest.hexdigest()}"

    def _inner(self) -> Iterator[tuple[str, int, int, int]]:
        """(class, file, first byte, bytes) of each inner archive."""
        with _opened(self.path) as window:
            for member in walk(window, self._stop):
                if member.name.endswith(".tar"):
                    yield Path(member.name).stem, 0, member.offset, member.size
                elif member.name.rpartition(".")[2].lower() in FORMATS:
                    raise ShardError(
                        f"{self.path}: holds images itself ({member.name}); name the folder with one tar file for each "
                        "class, or an archive of such files"
                    )

    def _scan(self, label: int, stem: str, file: int, base: int, length: int | None) -> np.ndarray:
        """Rows of one class archive."""
        rows: list[tuple[int, ...]] = []
        path = self._files[file]
        with _opened(path, base, length, stem) as window:
            for member in walk(window, lambda at, name, what: self._stop(at, name, what, path, stem)):
                suffix = member.name.rpartition(".")[2].lower()
                if suffix == "tar":
                    raise ShardError(
                        f"{path}: offset {member.offset}: {member.name} is a tar file inside a class's tar file; "
                        "name an archive of archives itself, not its folder"
                    )
                if suffix not in FORMATS:
                    self._other += 1
                    continue
                rows.append((file, member.offset, member.size, label, _SUFFIXES.index(suffix)))
        return np.array(rows, _ITEM)

    def _stop(
        self, offset: int, name: str | None, what: str, path: Path | None = None, stem: str | None = None
    ) -> NoReturn:
        where = f", class {stem}" if stem is not None and path == self.path else ""
        member = f" member {name}" if name is not None else ""
        raise ShardError(f"{path or self.path}{where}: offset {offset}{member}: {what}")


@contextmanager
def _opened(path: Path, base: int = 0, length: int | None = None, stem: str = "") -> Iterator[Window]:
    """A window on an archive; refuses compressed ones with a word on what to do."""
    with path.open("rb") as file:
        window = Window(file.fileno(), base, length)
        kind = _COMPRESSED.get(window.pread(2, 0))
        if kind is not None:
            inner = f" class {stem}," if base else ""
            raise ShardError(
                f"{path}:{inner} offset {base}: compressed ({kind}), so images cannot be read by position; "
                "decompress it once"
            )
        yield window
