"""Reading tar shards back, and writing the index and the manifest that describe them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..core.errors import ShardError
from ..core.files import write_whole
from .checks import FORMATS, SampleRejected, image_size
from .manifest import INDEX, ROW, Manifest, Rendition, Shard
from .tarwalk import Member, Report, Window, walk

INFO = "_info.json"
SIDE_MEMBERS = ("json", "txt")  # allowed beside the image and its label; not read
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset splits a member's name at the first dot
_CHUNK = 1 << 20


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
    with path.open("rb") as file:
        window = Window(file.fileno())
        for member in walk(window, report):
            name, offset, size = member.name, member.offset, member.size
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
            group[suffix] = (offset, size, _label_text(window, member))
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


def _label_text(window: Window, member: Member) -> bytes:
    """Content of a .cls member (its first bytes), b"" of any other."""
    if not member.name.lower().endswith(".cls"):
        return b""
    return window.pread(min(member.size, 64), member.offset)


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


def write_index(
    folder: Path,
    split: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    rows: Sequence[np.ndarray],
    rendition: Rendition | None = None,
) -> Manifest:
    """Write ``index.bin``, timm's ``_info.json`` and, last, the manifest."""
    index = b"".join(r.tobytes() for r in rows)
    write_whole(folder / INDEX, index)
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
    write_whole(folder / INFO, (json.dumps(info, indent=1) + "\n").encode())
    digest = hashlib.sha256(index).hexdigest()
    manifest = Manifest(folder, split, tuple(classes), tuple(shards), samples, digest, rendition)
    manifest.write()
    return manifest
