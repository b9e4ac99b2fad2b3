"""Checkpoint folders on disk: written aside, synced, hashed, renamed; ``latest`` moves last.

A folder counts only with a manifest whose sizes and SHA-256 digests hold; otherwise the next older one is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core import faults
from ..core.errors import CheckpointError
from ..core.files import sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
_ASIDE = ".tmp-old-"
_NAME = re.compile(r"^step-(\d{8,})$")


def name_of(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


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
    sync(path)


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
    sync(partial)
    faults.point("save.before_rename")
    old = final.parent / f"{_ASIDE}{final.name}"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        faults.point("save.replacing")
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync(final.parent)
    faults.point("save.before_latest")
    if latest:
        pointer = final.parent / (LATEST + ".partial")
        pointer.write_text(final.name + "\n")
        sync(pointer)
        pointer.replace(final.parent / LATEST)
        sync(final.parent)
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


def read_manifest(folder: Path, *, hashes: bool) -> dict[str, dict[str, Any]]:
    """Compare every file with the manifest; returns {name: {"bytes", "sha256"}}.

    Args:
        folder: the checkpoint.
        hashes: also compute the SHA-256 of every file; otherwise only the sizes are compared.

    Raises:
        CheckpointError: what is damaged: the manifest itself, or a file that is missing, has another size or another
            digest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, the checkpoint was not completed")
    try:
        files = {str(name): dict(entry) for name, entry in json.loads(path.read_text())["files"].items()}
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # of whatever kind the damage is
        raise CheckpointError(f"{path}: not a checkpoint manifest ({type(error).__name__}: {error})") from error
    if not files:
        raise CheckpointError(f"{path}: not a checkpoint manifest (it names no file)")
    for name, (size, digest) in expected.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names a file outside of the checkpoint: {name!r}")
        try:
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(f"{file}: {found} bytes, the manifest says {size}")
            if hashes and sha256_of(file) != digest:
                raise CheckpointError(f"{file}: SHA-256 differs from the manifest, the file is damaged")
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return files


def verify(folder: Path) -> None:
    """Check every file, sizes and digests, against the manifest.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    read_manifest(folder, hashes=True)


def candidates(root: Path) -> list[Path]:
    """Sealed checkpoints of `root`, the one named by ``latest`` first, then the newest first, by time of sealing."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        manifest = folder / MANIFEST
        if not folder.name.startswith(".") and manifest.is_file():
            found.append((manifest.stat().st_mtime_ns, folder.name, folder))
    ordered = [folder for _, _, folder in sorted(found, reverse=True)]
    name = latest_name(root)
    return sorted(ordered, key=lambda folder: folder.name != name)


def latest_name(root: Path) -> str | None:
    """What ``latest`` says; None where it is missing or not readable."""
    try:
        return (root / LATEST).read_text().strip() or None
    except (OSError, ValueError):
        return None


def recover(root: Path) -> None:
    """Tidy up after a run that ended while a checkpoint replaced another one of its name.

    The old one was moved aside for it: it is brought back where the new one was never completed, and deleted where the
    new one is good. In a folder that cannot be written nothing happens.
    """
    for old in root.glob(f"{_ASIDE}*"):
        final = root / old.name[len(_ASIDE) :]
        try:
            if not final.exists():
                old.rename(final)
                logger.warning("checkpoint %s was being replaced when the run ended; the old one is back", final)
                continue
            verify(final)
        except CheckpointError as error:
            logger.warning("%s; the checkpoint that it was to replace is still in %s", error, old)
        except OSError as error:
            logger.warning("checkpoint %s was being replaced when the run ended: %s", final, error)
        else:
            shutil.rmtree(old, ignore_errors=True)


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint that verifies, with one log line for each that does not.

    Raises:
        CheckpointError: there are, or were, checkpoints and none of them verifies.
    """
    problems = []
    name = latest_name(root)
    incomplete = {p for p in root.iterdir() if _NAME.match(p.name) and p.is_dir()} if root.is_dir() else set()
    if name is not None:
        incomplete.add(root / name)
    for folder in sorted(incomplete):
        if (folder / MANIFEST).is_file():
            continue
        if any(folder.glob("*mp_rank_*")) or any(folder.glob("*zero_pp_rank_*")):
            text = f'{folder}: DeepSpeed\'s own form; load it with load_checkpoint(..., form="deepspeed")'
        else:
            text = f"{folder}: " + (f"no {MANIFEST}" if folder.is_dir() else f"named by {LATEST}, but not there")
        logger.warning("checkpoint passed over: %s", text)
        problems.append(text)
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
    """Delete all but the newest `keep` numbered checkpoints (by time of sealing), and what older saves left behind."""
    guarded = {p.resolve() for p in protect}
    numbered = [p for p in candidates(root) if _NAME.match(p.name)]
    numbered.sort(key=lambda p: (p.resolve() not in guarded, -(p / MANIFEST).stat().st_mtime_ns))
    for folder in numbered[keep:]:
        if folder.resolve() not in guarded:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(".tmp-step-*"):
        if folder.name not in {f".tmp-{p.name}" for p in guarded}:
            shutil.rmtree(folder, ignore_errors=True)
