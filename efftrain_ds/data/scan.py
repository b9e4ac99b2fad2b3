"""Reading tar shards back, and writing the index and the manifest that describe them.

Members are walked with Python's tarfile in header mode. It ends silently at a damaged or cut header, so the end of
every archive is checked here: two zero blocks must follow the last member and only zeros after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..core.errors import ShardError
from .checks import FORMATS, SampleRejected, image_size
from .manifest import INDEX, ROW, Manifest, Shard

INFO = "_info.json"
SIDE_MEMBERS = ("json", "txt")  # allowed beside the image and its label; not read
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset splits a member's name at the first dot
_BLOCK = 512
_CHUNK = 1 << 20

Report = Callable[[int, "str | None", str], None]


@dataclass(frozen=True)
class TarSample:
    """One sample of a shard: key, suffix of the image member, where its payload lies, and its label."""

    key: str
    suffix: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        shard: file name relative to the folder.
        offset: byte in that file.
        key: key of the sample, where one is concerned.
        what: the finding in words.
    """

    shard: str
    offset: int
    key: str | None
    what: str

    def __str__(self) -> str:
        key = f" key {self.key}" if self.key is not None else ""
        return f"{self.shard}: offset {self.offset}{key}: {self.what}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def scan_shard(path: Path, report: Report | None = None) -> list[TarSample]:
    """Samples of a tar shard in file order, from its headers and labels.

    Args:
        path: uncompressed tar file.
        report: called with (offset, key, what) for each finding, and the scan goes on where it can; by default the
            first finding is raised.

    Raises:
        ShardError: not a tar file, cut or damaged, a name with further dots, an unknown suffix, a missing label or
            image, or a key that occurs twice; the text names file, offset and key.
    """

    def stop(offset: int, key: str | None, what: str) -> NoReturn:
        raise ShardError(str(Finding(str(path), offset, key, what)))

    report = report or stop
    samples: list[TarSample] = []
    seen: set[str] = set()
    group: dict[str, tuple[int, int, bytes]] = {}
    current: str | None = None
    for name, offset, size, text in _members(path, report):
        match = _NAME.match(name)
        if match is None:
            report(offset, name, "no suffix in the member's name")
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if "." in suffix:
            report(offset, name, "key with dots; webdataset cuts the name at the first dot, so samples would merge")
            continue
        if suffix not in FORMATS and suffix != "cls" and suffix not in SIDE_MEMBERS:
            allowed = ", ".join([*FORMATS, "cls", *SIDE_MEMBERS])
            report(offset, key, f"unknown suffix .{suffix}, allowed: {allowed}")
            continue
        if key != current:
            if current is not None:
                _close(samples, current, group, report)
            if key in seen:
                report(offset, key, "duplicate key")
            seen.add(key)
            current, group = key, {}
        if suffix in group:
            report(offset, key, f"duplicate key: a second .{suffix}")
            continue
        group[suffix] = (offset, size, text)
    if current is not None:
        _close(samples, current, group, report)
    return samples


def _close(samples: list[TarSample], key: str, group: dict[str, tuple[int, int, bytes]], report: Report) -> None:
    """Turn the members of one key into a sample."""
    first = min((offset for offset, _, _ in group.values()), default=0)
    images = [suffix for suffix in group if suffix in FORMATS]
    if len(images) != 1:
        report(first, key, f"{len(images)} image members ({', '.join(images)}), needed is one")
        return
    offset, size, _ = group[images[0]]
    if "cls" not in group:
        report(offset, key, f"missing label: no {key}.cls")
        return
    text = group["cls"][2].strip()
    if not re.fullmatch(rb"-?\d{1,9}", text):
        report(group["cls"][0], key, f"label {text[:20]!r} is not a class index")
        return
    samples.append(TarSample(key, images[0], offset, size, int(text)))


def _members(path: Path, report: Report) -> Iterator[tuple[str, int, int, bytes]]:
    """(name, data offset, size, content of a .cls member) of each file in the archive."""
    length = path.stat().st_size
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below; "r:" refuses compressed archives
    except tarfile.TarError as error:
        report(0, None, f"not an uncompressed tar file ({error}; {length} bytes)")
        return
    with tar:
        while True:
            try:
                info = tar.next()
            except tarfile.TarError as error:
                report(tar.offset, None, f"damaged or cut member ({error})")
                return
            if info is None:
                break
            tar.members = []  # the archive object would keep every member
            if info.isdir() or re.fullmatch(r"__[^/]*__", info.name):
                continue
            if not info.isreg():
                report(info.offset, info.name, "neither a file nor a folder")
                continue
            end = info.offset_data + info.size
            if end > length:
                report(info.offset_data, info.name, f"payload ends at byte {end}, the file at {length}")
                return
            text = b""
            if info.name.lower().endswith(".cls"):
                text = os.pread(tar.fileobj.fileno(), min(info.size, 64), info.offset_data)
            yield info.name, info.offset_data, info.size, text
        _check_end(tar.fileobj, tar.offset, length, report)


def _check_end(file: object, offset: int, length: int, report: Report) -> None:
    descriptor = file.fileno()  # type: ignore[attr-defined]
    tail = os.pread(descriptor, 2 * _BLOCK, offset)
    if any(tail[:_BLOCK]):
        cut = len(tail) < _BLOCK
        report(offset, None, f"member header {'cut' if cut else 'damaged'}; the rest of the shard cannot be read")
    elif len(tail) < 2 * _BLOCK:
        report(length, None, f"the two zero blocks at the end are cut ({len(tail)} of {2 * _BLOCK} bytes)")
    else:
        at = offset
        while chunk := os.pread(descriptor, _CHUNK, at):
            if any(chunk):
                report(at, None, "bytes after the end of the archive")
                return
            at += len(chunk)


def read_rows(path: Path, number: int) -> tuple[np.ndarray, list[TarSample], np.ndarray]:
    """Index rows of an existing shard, its samples, and a 128-bit hash of each payload.

    Returns:
        (rows [n] of dtype `ROW`, samples, hashes [n] of dtype V16).

    Raises:
        ShardError: see `scan_shard`; or an image without a readable header.
    """
    samples = scan_shard(path)
    rows, hashes = np.zeros(len(samples), ROW), np.zeros(len(samples), "V16")
    with path.open("rb") as file:
        for i, sample in enumerate(samples):
            file.seek(sample.offset)
            payload = file.read(sample.size)
            try:
                width, height = image_size(payload)
            except SampleRejected as error:
                raise ShardError(str(Finding(str(path), sample.offset, sample.key, str(error)))) from error
            rows[i] = (number, sample.offset, sample.size, sample.label, width, height)
            hashes[i] = payload_hash(payload)
    return rows, samples, hashes


def payload_hash(payload: bytes) -> bytes:
    """16 bytes that identify a payload, for finding exact duplicates."""
    return hashlib.blake2b(payload, digest_size=16).digest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_index(
    folder: Path, split: str, classes: Sequence[str], shards: Sequence[Shard], rows: Sequence[np.ndarray]
) -> Manifest:
    """Write ``index.bin``, timm's ``_info.json`` and, last, the manifest."""
    index = b"".join(r.tobytes() for r in rows)
    write_atomic(folder / INDEX, index)
    samples = sum(s.n for s in shards)
    info = {
        "splits": {
            split: {
                "name": split,
                "num_samples": samples,
                "filenames": [s.name for s in shards],
                "shard_lengths": [s.n for s in shards],
            }
        }
    }
    write_atomic(folder / INFO, (json.dumps(info, indent=1) + "\n").encode())
    digest = hashlib.sha256(index).hexdigest()
    manifest = Manifest(folder, split, tuple(classes), tuple(shards), samples, digest)
    with manifest.write().open("rb") as file:
        os.fsync(file.fileno())
    return manifest
