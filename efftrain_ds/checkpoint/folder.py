"""Checkpoint folders on disk: written aside, synced, hashed, renamed; ``latest`` moves last.

A folder counts only with a manifest whose sizes and SHA-256 digests hold; otherwise the next older one is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..core import faults
from ..core.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"^step-(\d{8,})$")


def name_of(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


def sync_file(path: Path) -> None:
    """Flush a file (or a directory entry) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, document: object) -> None:
    """Write and sync a JSON file."""
    path.write_text(json.dumps(document, indent=1) + "\n")
    sync_file(path)


def receipt_name(rank: int) -> str:
    """File that a rank leaves in a checkpoint that is being written, see `background`."""
    return f"rank-{rank:05d}.receipt"


def seal(partial: Path, final: Path, entries: Iterable[dict], *, latest: bool = True) -> None:
    """Turn a complete temporary folder into the checkpoint `final` and point ``latest`` at it.

    A checkpoint of the same name is moved aside first and deleted last, so that one of the two is always there.

    Args:
        partial: the temporary folder.
        final: the checkpoint.
        entries: {"name", "bytes", "sha256"} of every file, of all ranks.
        latest: move the pointer.

    Raises:
        CheckpointError: a file of some rank is not to be seen here.
        OSError: the disk refuses.
    """
    digests = {entry["name"]: {key: entry[key] for key in ("bytes", "sha256")} for entry in entries}
    for name, entry in digests.items():
        file = partial / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: written by its rank but not to be seen on the first one; the output folder must be on a "
                "file system that all nodes share"
            )
    faults.point("save.before_manifest")
    write_json(partial / MANIFEST, {"format": 1, "files": digests})
    sync_file(partial)
    faults.point("save.before_rename")
    old = final.parent / f".tmp-old-{final.name}"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync_file(final.parent)
    faults.point("save.before_latest")
    if latest:
        pointer = final.parent / (LATEST + ".partial")
        pointer.write_text(final.name + "\n")
        sync_file(pointer)
        pointer.replace(final.parent / LATEST)
        sync_file(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    faults.point("save.end")


def free_space(root: Path, needed: int) -> None:
    """Refuse to begin what cannot fit.

    Args:
        root: folder of the checkpoints.
        needed: bytes of all ranks' files.

    Raises:
        CheckpointError: less than that is free.
    """
    found = shutil.disk_usage(root).free
    if found < needed + _MARGIN:
        raise CheckpointError(
            f"{root}: {found / 1e6:,.0f} MB free, the checkpoint needs {(needed + _MARGIN) / 1e6:,.0f} MB; free some "
            "space, or lower efftrain.checkpoint.keep"
        )


_MARGIN = 1 << 20
"""Bytes for the small files of a checkpoint."""


def verify(folder: Path) -> dict:
    """Check every file against the manifest; returns the manifest.

    Raises:
        CheckpointError: a file is missing, has another size or another digest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, the checkpoint was not completed")
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint manifest ({error})") from error
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: {size} bytes, the manifest says {entry['bytes']}")
        if sha256_of(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: SHA-256 differs from the manifest, the file is damaged")
    return manifest


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders of `root`, the one named by ``latest`` first, then newest first."""
    found = (
        [p for p in root.iterdir() if p.is_dir() and p.name != "" and (p / MANIFEST).exists()] if root.is_dir() else []
    )
    found.sort(key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
    numbered = [p for p in found if _NAME.match(p.name)]
    numbered.sort(key=lambda p: int(_NAME.match(p.name).group(1)), reverse=True)  # type: ignore[union-attr]
    ordered = numbered + [p for p in found if not _NAME.match(p.name)]
    pointer = root / LATEST
    if pointer.is_file():
        name = pointer.read_text().strip()
        ordered.sort(key=lambda p: p.name != name)
    return [p for p in ordered if not p.name.startswith(".")]


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint that verifies, with one log line for each that does not.

    Raises:
        CheckpointError: there are checkpoints and none of them verifies.
    """
    pointer = root / LATEST
    named = root / pointer.read_text().strip() if pointer.is_file() else None
    if named is not None and named.is_dir() and not (named / MANIFEST).exists() and not candidates(root):
        raise CheckpointError(
            f"{named}: has no {MANIFEST}; it looks like DeepSpeed's own form, which this version does not read. Load "
            "it with engine.deepspeed_engine.load_checkpoint, or name another folder"
        )
    problems = []
    for folder in candidates(root):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
            problems.append(str(error))
            continue
        if problems:
            logger.warning("going on from the older checkpoint %s", folder)
        return folder
    if problems:
        raise CheckpointError(f"{root}: no usable checkpoint\n" + "\n".join(problems))
    return None


def prune(root: Path, keep: int, protect: Iterable[Path] = ()) -> None:
    """Delete all but the newest `keep` numbered checkpoints, and left-over temporary folders."""
    numbered = sorted((p for p in root.iterdir() if _NAME.match(p.name)), key=lambda p: p.name, reverse=True)
    guarded = {p.resolve() for p in protect}
    for folder in numbered[keep:]:
        if folder.resolve() not in guarded:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)
