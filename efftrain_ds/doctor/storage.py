"""Shared memory, disk, open files, processors, and the shards."""

from __future__ import annotations

import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..core.redact import redacted
from ..core.text import bytes_text
from .check import FAIL, NONE, OK, WARN, Check, Setup

_SHM = Path("/dev/shm")
_SHM_USUAL = 1 << 30
_OPEN_FILES = 4096
_PROBE_BYTES, _BLOCK, _PROBE_SECONDS = 64 << 20, 4 << 20, 2.0
_SLOW_DISK = 50e6


def shared_memory(setup: Setup) -> Check:
    """Room for the batches that loader processes hand over."""
    if not _SHM.is_dir():
        return Check("shared memory", NONE, f"no {_SHM} on this system")
    usage = shutil.disk_usage(_SHM)
    text = f"{bytes_text(usage.free)} of {bytes_text(usage.total)} free in {_SHM}"
    fix = "give it more (containers: --shm-size=8g), or lower efftrain.data.workers or prefetch"
    if setup.config is None:
        if usage.free < _SHM_USUAL:
            return Check("shared memory", WARN, f"{text}; loaders of large images need more", fix)
        return Check("shared memory", OK, text)
    needed = loader_bytes(setup)
    if needed == 0:
        return Check("shared memory", OK, f"{text}; workers is 0, none needed")
    text += f", the loaders need up to {bytes_text(needed)}"
    return Check("shared memory", FAIL if needed > usage.free else OK, text, fix if needed > usage.free else "")


def abandoned_memory(setup: Setup) -> Iterator[Check]:
    """Shared memory that ended runs of plain DeepSpeed without accelerators hold for ever."""
    from ..zero.shared_buffers import PREFIX, abandoned_buffers

    found = abandoned_buffers(_SHM)
    if found:
        size = sum(path.stat().st_size for path in found if path.exists())
        text = f"{len(found)} buffers of ended DeepSpeed runs hold {bytes_text(size)} of {_SHM}"
        yield Check("left memory", WARN, text, f"when no run of yours is on: rm {_SHM}/{PREFIX}_*")


def loader_bytes(setup: Setup) -> int:
    """Bytes of all micro-batches in flight on this machine: uint8 images, (workers x prefetch + 2) a rank."""
    assert setup.config is not None
    data = setup.config.efftrain.data
    if data.workers == 0:
        return 0
    if setup.plan is not None:
        micro = max(s.stage.micro_batch for s in setup.plan.stages)
    else:
        from ..config.deepspeed_keys import batch_sizes

        micro = batch_sizes(setup.config.deepspeed, setup.world).micro_batch
    return micro * 3 * data.resolution**2 * (data.workers * data.prefetch + 2) * setup.local_ranks


def output(setup: Setup) -> Iterator[Check]:
    """The output folder can be written, at what rate, and holds the checkpoints to be kept."""
    where = setup.output
    folder = next(p for p in (where.absolute(), *where.absolute().parents) if p.exists())
    if not folder.is_dir():
        yield Check("output", FAIL, f"{folder} is a file", "name another folder: efftrain.run.output")
        return
    try:
        rate = write_rate(folder)
    except OSError as error:
        fix = "name another folder: efftrain.run.output" if setup.config is not None else "go to another folder"
        yield Check("output", FAIL, f"{folder} cannot be written: {error.strerror or error}", fix)
        return
    text = f"{where if setup.config is not None else folder} writable, {bytes_text(rate)}/s with fsync"
    slow = "use a local or a faster disk, or save less often (efftrain.checkpoint.every)"
    yield Check("output", WARN if rate < _SLOW_DISK else OK, text, slow if rate < _SLOW_DISK else "", {"rate": rate})
    yield _room(setup, folder, rate)


def write_rate(folder: Path) -> float:
    """Bytes a second of writing and syncing a file, which is removed again.

    Raises:
        OSError: the folder cannot be written.
    """
    block = os.urandom(_BLOCK)  # zeros would be compressed away by some file systems
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".efftrain-doctor-") as file:
        start, written = time.perf_counter(), 0
        while written < _PROBE_BYTES and time.perf_counter() - start < _PROBE_SECONDS:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written += _BLOCK
        return written / (time.perf_counter() - start)


def _room(setup: Setup, folder: Path, rate: float) -> Check:
    free = shutil.disk_usage(folder).free
    size = checkpoint_bytes(setup)
    if size is None or setup.config is None:
        return Check(
            "disk space",
            OK if free > 1 << 30 else WARN,
            f"{bytes_text(free)} free",
            "" if free > 1 << 30 else "free some space",
        )
    keep = setup.config.efftrain.checkpoint.keep
    needed = (keep + 1) * size  # an old one goes only when the new one stands
    text = (
        f"{bytes_text(free)} free; {keep} checkpoints of about {bytes_text(size)} and one being written need "
        f"{bytes_text(needed)}, a save takes {max(size / rate, 0.1):.1f} s at this rate"
    )
    if free < needed:
        return Check("disk space", FAIL, text, "free some space, or lower efftrain.checkpoint.keep")
    return Check("disk space", OK, text, data={"free": free, "checkpoint": size})


def checkpoint_bytes(setup: Setup) -> int | None:
    """Size of a checkpoint: fp32 masters, the optimizer's moments and the average; None without a plan."""
    if setup.config is None or setup.plan is None:
        return None
    kind = str((setup.config.deepspeed.get("optimizer") or {}).get("type", "adam")).lower()
    moments = 1 if kind in ("sgd", "lion", "fusedlion", "muon") else 2
    average = 1 if setup.config.efftrain.model.ema is not None else 0
    return 4 * (1 + moments + average) * setup.plan.params


def open_files(setup: Setup) -> Check:
    """Limit of open files of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = ["no limit" if n == resource.RLIM_INFINITY else f"{n:,}" for n in (soft, hard)]
    text = f"{words[0]} (hard limit {words[1]})"
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Check(
            "open files", WARN, f"{text}; shards, loaders and collectives may need more", f"ulimit -n {_OPEN_FILES}"
        )
    return Check("open files", OK, text)


def processors(setup: Setup) -> Check:
    """Processors of this process against the ranks and their loaders."""
    count = cpu_count()
    text = f"{count:g} processor{'s' if count != 1 else ''}"
    if setup.config is None:
        return Check("processors", OK, text, data={"count": count})
    workers, ranks = setup.config.efftrain.data.workers, setup.local_ranks
    needed = ranks * (1 + workers)
    text += f", {needed} process{'es' if needed != 1 else ''}: {ranks} x (1 rank + {workers} loaders)"
    if needed > math.ceil(count):
        fewer = max(1, int(count / ranks) - 1)
        fix = (
            f"lower efftrain.data.workers to {fewer}"
            if fewer < workers
            else "start fewer ranks, or accept slower loading"
        )
        return Check("processors", WARN, text, fix, {"count": count})
    return Check("processors", OK, text, data={"count": count})


def cpu_count() -> float:
    """Processors that this process may use: its affinity, and the quota of its container."""
    count = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, int(quota) / int(period)) if quota != "max" else count
    except (OSError, ValueError):
        return count


def shards(setup: Setup) -> Iterator[Check]:
    """Manifests, sizes and the first image of each split."""
    if setup.config is None:
        yield Check("data", NONE, "no configuration")
        return
    data = setup.config.efftrain.data
    for key, where in (("train", data.train), ("val", data.val)):
        if where:
            yield _split(f"data.{key}", where)
        elif key == "train":
            yield Check("data.train", NONE, "efftrain.data.train is not given (data of your own)")


def _split(key: str, where: str) -> Check:
    from ..core.errors import ShardError
    from ..data import bundled
    from ..data.decode import decode_pil
    from ..data.manifest import MANIFEST, load_manifest
    from ..data.reader import ShardReader, check_shards

    if "://" in where or where.startswith("pipe:"):
        return Check(key, NONE, f"{redacted(where)}: remote, not read here")
    try:
        if (count := bundled.samples(where)) is not None:
            width, height = decode_pil(bundled.source(where).get(0).payload).size
            return Check(key, OK, f"{where}: {count:,} samples, the first is {width} x {height} pixels")
        manifest = load_manifest(where)
        check_shards(manifest)
        reader = ShardReader(manifest)
        try:
            shard, offset, size, label = reader.rows([0])[0][:4]
            width, height = decode_pil(reader.payload(shard, offset, size)).size
        finally:
            reader.close()
    except ShardError as error:
        if not (Path(where) / MANIFEST).exists():
            return Check(key, FAIL, f"{where}: no {MANIFEST} there", f"efftrain shards build ... --out {where}")
        return Check(key, FAIL, str(error), f"efftrain shards audit {where}")
    total = sum(s.bytes for s in manifest.shards)
    text = (
        f"{manifest.samples:,} samples in {len(manifest.shards)} shards ({bytes_text(total)}), sizes right, "
        f"the first image is {width} x {height} pixels, class {label}"
    )
    return Check(key, OK, text)
