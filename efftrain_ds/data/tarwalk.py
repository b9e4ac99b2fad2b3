"""Walking the members of a tar archive by their headers, wherever in a file the archive lies.

Python's tarfile ends silently at a damaged or cut header, so the end of every archive is checked here: two zero blocks
must follow the last member and only zeros after them. Compressed archives are refused, because nothing in them can be
read by position.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
_CHUNK = 1 << 20

Report = Callable[[int, "str | None", str], None]


@dataclass(frozen=True)
class Member:
    """One file of an archive: name, place of its bytes in the outermost file, size."""

    name: str
    offset: int
    size: int


class Window(io.RawIOBase):
    """Read-only view of `length` bytes of an open file from `base` on, with a position of its own.

    Args:
        descriptor: open file; not closed here.
        base: first byte of the view.
        length: bytes of the view; None takes all up to the file's end.
    """

    def __init__(self, descriptor: int, base: int = 0, length: int | None = None):
        super().__init__()
        self.descriptor = descriptor
        self.base = base
        self.length = os.fstat(descriptor).st_size - base if length is None else length
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place in the view."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        return self._at

    def tell(self) -> int:
        """Place in the view."""
        return self._at

    def pread(self, count: int, at: int) -> bytes:
        """At most `count` bytes at a place of the view."""
        return os.pread(self.descriptor, max(0, min(count, self.length - at)), self.base + at)

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes (-1 = all) from the current place on."""
        data = self.pread(self.length if count is None or count < 0 else count, self._at)
        self._at += len(data)
        return data


def walk(window: Window, report: Report) -> Iterator[Member]:
    """Regular files of the archive, in file order.

    Folders and webdataset's ``__name__`` members are left out.

    Args:
        window: where the archive lies.
        report: called with (offset in the outermost file, member name or None, finding); it may raise. The walk goes
            on where it can.
    """
    base, length = window.base, window.length
    try:
        tar = tarfile.open(fileobj=window, mode="r:")  # noqa: SIM115 - closed below; "r:" refuses compressed archives
    except tarfile.TarError as error:
        report(base, None, f"not an uncompressed tar file ({error}; {length} bytes)")
        return
    with tar:
        while True:
            try:
                info = tar.next()
            except tarfile.TarError as error:
                report(base + tar.offset, None, f"damaged or cut member ({error})")
                return
            if info is None:
                break
            tar.members = []  # the archive object would keep every member
            if info.isdir() or re.fullmatch(r"__[^/]*__", info.name):
                continue
            if not info.isreg():
                report(base + info.offset, info.name, "neither a file nor a folder")
                continue
            end = info.offset_data + info.size
            if end > length:
                report(base + info.offset_data, info.name, f"payload ends at byte {base + end}, {_whole(window)}")
                return
            yield Member(info.name, base + info.offset_data, info.size)
        _check_end(window, tar.offset, report)


def _whole(window: Window) -> str:
    return f"the {'file' if window.base == 0 else 'archive'} at {window.base + window.length}"


def _check_end(window: Window, offset: int, report: Report) -> None:
    """Two zero blocks and nothing but zeros after them."""
    tail = window.pread(2 * BLOCK, offset)
    if any(tail[:BLOCK]):
        cut = len(tail) < BLOCK
        what = f"member header {'cut' if cut else 'damaged'}; the rest of the shard cannot be read"
        report(window.base + offset, None, what)
    elif len(tail) < 2 * BLOCK:
        what = f"the two zero blocks at the end are cut ({len(tail)} of {2 * BLOCK} bytes)"
        report(window.base + window.length, None, what)
    else:
        at = offset
        while chunk := window.pread(_CHUNK, at):
            if any(chunk):
                report(window.base + at, None, "bytes after the end of the archive")
                return
            at += len(chunk)
