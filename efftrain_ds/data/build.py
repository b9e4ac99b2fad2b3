"""Packing images into tar shards, resumable and byte for byte reproducible.

The whole plan (order and cuts) follows from source and seed before the first byte is written. Each shard is written
under another name, synced, renamed and then noted in ``build.journal``; a rerun keeps every noted shard whose hash
matches and packs the others, so the result does not depend on how often the build was interrupted. The manifest
comes last: without it the folder is not a data set.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ShardError
from ..core.files import sync, write_whole
from .manifest import MANIFEST, Rendition, Shard
from .pack import Packed, PackPlan, make_plan, pack_all
from .rendition import DEFAULT_QUALITY, make_rendition
from .scan import file_sha256, read_rows, write_index
from .sources import Source

logger = logging.getLogger(__name__)

JOURNAL = "build.journal"
REJECTED = "rejected.jsonl"
DUPLICATES = "duplicates.jsonl"


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        folder: where the shards are.
        split: name of the split.
        digest: identity of the data set (`Manifest.digest`).
        source: images of the source; equals packed + rejected.
        packed: images in the shards.
        rejected: images left out, listed in ``rejected.jsonl``.
        reasons: rejected images by reason.
        duplicates: images whose bytes equal those of an earlier one (packed all the same, see ``duplicates.jsonl``).
        kinds: packed images by format and colour mode; "exif removed" counts those that lost an EXIF block, "resized"
            those that a rendition made smaller.
        shards: number of shards.
        reused: shards kept from an earlier run.
        bytes: size of all shards.
        rendition: how images were made smaller, or None.
    """

    folder: str
    split: str
    digest: str
    source: int
    packed: int
    rejected: int
    reasons: dict[str, int]
    duplicates: int
    kinds: dict[str, int]
    shards: int
    reused: int
    bytes: int
    rendition: Rendition | None = None


def build_shards(
    source: Source,
    out: str | Path,
    *,
    split: str,
    shard_bytes: int = 200_000_000,
    samples_per_shard: int | None = None,
    seed: int = 0,
    workers: int = 1,
    min_side: int | None = None,
    short_side: int | None = None,
    quality: int = DEFAULT_QUALITY,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Pack a source into `out`: shards, index, manifest, timm's ``_info.json`` and the list of rejected images.

    Samples are ``KEY.<suffix>`` and ``KEY.cls`` where KEY is the place in the shuffled order; a rejected image leaves a
    gap in the keys. Shards are cut to nearly equal size, at most about `shard_bytes` (or `samples_per_shard`) each.

    Args:
        source: images and labels.
        out: folder; empty, new, or one where the same build was begun.
        split: name of the split, first part of the shards' names.
        shard_bytes: target size of a shard in bytes.
        samples_per_shard: largest number of samples in a shard, instead of `shard_bytes`.
        seed: seed of the order.
        workers: processes; each packs whole shards.
        min_side: smallest allowed side in pixels; None takes the source's.
        short_side: make a rendition: images with a larger short side are resized to so many pixels (see `rendition`);
            None copies all.
        quality: JPEG quality of resized images.
        progress: called with (finished shards, all shards).

    Raises:
        ShardError: the source is empty or wholly rejected, `out` holds something else, another build runs there, or a
            file cannot be read. What is finished stays for the next run; there is no manifest.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ShardError(f"split {split!r}: allowed are letters, digits and _")
    if shard_bytes < 1 or (samples_per_shard is not None and samples_per_shard < 1) or workers < 1:
        raise ShardError(
            "shard size and workers must be positive, found "
            f"shard_bytes={shard_bytes}, samples_per_shard={samples_per_shard}, workers={workers}"
        )
    if len(source) == 0:
        raise ShardError("the source holds no images")
    out = Path(out)
    rendition = make_rendition(short_side, quality) if short_side is not None else None
    plan = make_plan(source, split, shard_bytes, samples_per_shard, seed, min_side, rendition)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            done = _resume(out, plan)
            reused, total = len(done), len(plan.starts) - 1
            todo = [shard for shard in range(total) if shard not in done]
            if todo:
                (out / MANIFEST).unlink(missing_ok=True)
                with (out / JOURNAL).open("a") as journal:
                    for packed in pack_all(source, plan, out, todo, workers):
                        done[packed.record["shard"]] = packed
                        journal.write(_line(packed.record))
                        journal.flush()
                        os.fsync(journal.fileno())
                        if progress is not None:
                            progress(len(done), total)
            return _finish(source, plan, out, [done[i] for i in range(total)], reused)
    except OSError as error:
        raise ShardError(f"{out}: cannot be written ({error}); finished shards stay, run it again to go on") from error


def _resume(out: Path, plan: PackPlan) -> dict[int, Packed]:
    """Shards of an earlier run of the same plan that are intact; starts a journal where there is none."""
    for partial in out.glob("*.partial"):
        partial.unlink()
    path = out / JOURNAL
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [record for record in map(_parse, lines) if record is not None]
    if not records:
        if any(out.glob("*.tar")) or (out / MANIFEST).exists():
            raise ShardError(f"{out}: holds shards of another origin; choose a new folder or empty this one")
        write_whole(path, _line(plan.header))
        return {}
    found = records[0]
    if found != plan.header:
        differs = [name for name in {**plan.header, **found} if found.get(name) != plan.header.get(name)]
        raise ShardError(
            f"{path}: was begun with another {', '.join(differs)}; repeat the same command, or empty the folder"
        )
    if not lines[-1].endswith("}") or _parse(lines[-1]) is None:  # cut while it was written
        write_whole(path, "".join(map(_line, records)))
    done: dict[int, Packed] = {}
    for record in records[1:]:
        shard = out / record["name"]
        if not shard.is_file() or shard.stat().st_size != record["bytes"] or file_sha256(shard) != record["sha256"]:
            continue
        rows, samples, hashes = read_rows(shard, record["shard"])
        positions = np.fromiter((int(sample.key) for sample in samples), np.int64, len(samples))
        done[record["shard"]] = Packed(record, rows, positions, hashes)
    return done


def _finish(source: Source, plan: PackPlan, out: Path, packed: list[Packed], reused: int) -> BuildReport:
    """Write everything that comes after the shards, the manifest last."""
    rejected = [entry for p in packed for entry in p.record["rejected"]]
    count = sum(p.record["n"] for p in packed)
    assert count + len(rejected) == len(source), (count, len(rejected), len(source))
    assert all(len(p.rows) == p.record["n"] for p in packed)
    write_whole(out / REJECTED, "".join(map(_line, rejected)))
    if count == 0:
        first = rejected[0]
        raise ShardError(
            f"all {len(source)} images were rejected, see {out / REJECTED}; "
            f"the first one: {first['name']}: {first['reason']}: {first['detail']}"
        )
    if rejected:
        logger.warning("%s: %d of %d images rejected, see %s", out, len(rejected), len(source), REJECTED)
    twins = list(_duplicates(source, plan, packed))
    write_whole(out / DUPLICATES, "".join(map(_line, twins)))
    # canonical order: the journal too is the same however the build went
    write_whole(out / JOURNAL, "".join(map(_line, [plan.header, *(p.record for p in packed)])))
    shards = [Shard(*(p.record[name] for name in ("name", "bytes", "sha256", "n"))) for p in packed]
    manifest = write_index(out, plan.split, source.classes, shards, [p.rows for p in packed], plan.rendition)
    sync(out)
    kinds: Counter[str] = Counter()
    for p in packed:
        kinds.update(p.record["kinds"])
    return BuildReport(
        folder=str(out),
        split=plan.split,
        digest=manifest.digest,
        source=len(source),
        packed=count,
        rejected=len(rejected),
        reasons=dict(sorted(Counter(entry["reason"] for entry in rejected).items())),
        duplicates=len(twins),
        kinds=dict(sorted(kinds.items())),
        shards=len(shards),
        reused=reused,
        bytes=sum(s.bytes for s in shards),
        rendition=plan.rendition,
    )


def _duplicates(source: Source, plan: PackPlan, packed: Iterable[Packed]) -> Iterator[dict[str, Any]]:
    """Samples whose payload equals that of an earlier one."""
    parts = list(packed)
    hashes = np.concatenate([p.hashes for p in parts])
    positions = np.concatenate([p.positions for p in parts])
    labels = np.concatenate([p.rows["label"] for p in parts])
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    for row in np.flatnonzero(first[group] != np.arange(len(hashes))):
        twin = first[group[row]]
        names = [source.get(int(plan.order[positions[r]])).name for r in (row, twin)]
        yield {
            "key": plan.key(int(positions[row])),
            "label": int(labels[row]),
            "name": names[0],
            "same_as": {"key": plan.key(int(positions[twin])), "label": int(labels[twin]), "name": names[1]},
        }


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ShardError(f"{out}: another build is writing there") from error
        yield


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
