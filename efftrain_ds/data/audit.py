"""Do the shards hold what the manifest says? And a manifest for shards that were not made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import ShardError
from .checks import SampleRejected, check_image
from .manifest import INDEX, MANIFEST, Manifest, Shard, load_manifest
from .scan import Finding, Report, TarSample, file_sha256, read_rows, scan_shard, write_index


@dataclass(frozen=True)
class AuditReport:
    """Result of `audit_shards`."""

    folder: str
    shards: int
    samples: int
    decoded: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings


def audit_shards(folder: str | Path, *, decode: bool = False) -> AuditReport:
    """Compare a shard folder with its manifest; every difference becomes a finding.

    Checked: missing and extra shards, sizes, hashes, the index and its hash, that each row points at the payload the
    tar headers name, labels against classes and ``.cls`` members, and keys that occur twice or have dots.

    Args:
        folder: shard folder.
        decode: also decode every image and compare its size with the index.

    Raises:
        ShardError: there is no readable manifest.
    """
    manifest = load_manifest(folder)
    folder = manifest.folder
    findings: list[Finding] = []
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            findings.append(Finding(path.name, 0, None, "extra shard, not in the manifest"))
    try:
        table: np.ndarray | None = manifest.table
        if (found := file_sha256(folder / INDEX)) != manifest.index_sha256:
            findings.append(Finding(INDEX, 0, None, f"sha256 {found}, the manifest says {manifest.index_sha256}"))
    except ShardError as error:
        table = None
        findings.append(Finding(INDEX, 0, None, str(error)))
    where: dict[str, str] = {}
    decoded = 0
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name

        def report(offset: int, key: str | None, what: str, name: str = shard.name) -> None:
            findings.append(Finding(name, offset, key, what))

        if not path.is_file():
            report(0, None, "missing shard")
            continue
        size = path.stat().st_size
        if size != shard.bytes:
            report(min(size, shard.bytes), None, f"{size} bytes, the manifest says {shard.bytes}")
        if (found := file_sha256(path)) != shard.sha256:
            report(0, None, f"sha256 {found}, the manifest says {shard.sha256}")
        samples = scan_shard(path, report)
        for sample in samples:
            if sample.key in where and where[sample.key] != shard.name:
                report(sample.offset, sample.key, f"duplicate key, also in {where[sample.key]}")
            where[sample.key] = shard.name
            if not 0 <= sample.label < len(manifest.classes):
                report(sample.offset, sample.key, f"label {sample.label}, allowed: 0 to {len(manifest.classes) - 1}")
        if len(samples) != shard.n:
            report(size, None, f"{len(samples)} readable samples, the manifest says {shard.n}")
        rows = None
        if table is not None:
            first, last = manifest.shard_starts[number : number + 2]
            rows = table[first:last]
            _compare(rows, samples, number, report)
        if decode:
            decoded += _decode(path, samples, rows, report)
    return AuditReport(str(folder), len(manifest.shards), manifest.samples, decoded, tuple(findings))


def _compare(rows: np.ndarray, samples: Sequence[TarSample], number: int, report: Report) -> None:
    """Rows of the index against the samples of the tar file."""
    for row, sample in zip(rows, samples, strict=False):
        for name, expected in (("shard", number), ("offset", sample.offset), ("size", sample.size)):
            if row[name] != expected:
                report(sample.offset, sample.key, f"index row has {name} {row[name]}, the tar file {expected}")
        if row["label"] != sample.label:
            report(sample.offset, sample.key, f"index row has label {row['label']}, the .cls member {sample.label}")


def _decode(path: Path, samples: Sequence[TarSample], rows: np.ndarray | None, report: Report) -> int:
    """Decode every image; returns how many were good."""
    good = 0
    with path.open("rb") as file:
        for i, sample in enumerate(samples):
            file.seek(sample.offset)
            try:
                image = check_image(file.read(sample.size), sample.suffix)
            except SampleRejected as error:
                report(sample.offset, sample.key, str(error))
                continue
            good += 1
            if rows is not None and i < len(rows):
                said = (int(rows[i]["width"]), int(rows[i]["height"]))
                if said != (image.width, image.height):
                    report(sample.offset, sample.key, f"image {image.width}x{image.height}, index {said[0]}x{said[1]}")
    return good


def index_shards(folder: str | Path, *, split: str = "train", classes: Sequence[str] | None = None) -> Manifest:
    """Make index and manifest for shards that were not made here (any ``*.tar`` in webdataset's layout).

    Args:
        folder: folder of uncompressed tar files; each sample needs one image and a decimal ``.cls`` member.
        split: name of the split.
        classes: class names; by default the numbers from 0 to the largest label.

    Raises:
        ShardError: no shards, a manifest is there already, or a shard is damaged or has a sample that cannot be used
            (the text names the shard and the key). Nothing is written then.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise ShardError(f"{folder / MANIFEST}: is there already; remove it to make a new one")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ShardError(f"{folder}: no *.tar files there")
    shards: list[Shard] = []
    tables: list[np.ndarray] = []
    where: dict[str, str] = {}
    largest = -1
    for number, path in enumerate(paths):
        rows, samples, _ = read_rows(path, number)
        for sample in samples:
            bad = None
            if sample.key in where:
                bad = f"duplicate key, also in {where[sample.key]}"
            elif sample.label < 0 or (classes is not None and sample.label >= len(classes)):
                bad = f"unknown label {sample.label}" + (f", {len(classes)} classes are named" if classes else "")
            if bad:
                raise ShardError(str(Finding(str(path), sample.offset, sample.key, bad)))
            where[sample.key] = path.name
            largest = max(largest, sample.label)
        shards.append(Shard(path.name, path.stat().st_size, file_sha256(path), len(samples)))
        tables.append(rows)
    names = tuple(classes) if classes is not None else tuple(str(c) for c in range(largest + 1))
    return write_index(folder, split, names, shards, tables)
