"""Files that survive a crash of the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder (what was created, renamed or deleted in it), to disk.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that is there whole or not at all, also after a crash of the machine; text as UTF-8.

    Raises:
        OSError: the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()  # half a file takes room that a full disk does not have
        raise
    sync(path.parent)
