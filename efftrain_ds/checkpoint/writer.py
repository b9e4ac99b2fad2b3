"""Files of a checkpoint, hashed while they are written and synced before they count."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import faults
from ..core.errors import CheckpointError

_BLOCK = 1 << 24
_AHEAD = 16
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class Part:
    """One file of a checkpoint, in memory.

    Attributes:
        name: file name.
        content: text, or tensors by name for a safetensors file.
    """

    name: str
    content: str | dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the content, without the header of the file."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(t.numel() * t.element_size() for t in self.content.values())

    def owned(self, buffers: dict[str, Tensor]) -> Part:
        """A copy in host memory that later training steps do not change.

        Args:
            buffers: memory of an earlier copy, which nobody reads any more; used again where it fits, and kept for the
                next one. Fresh memory costs more than the copying.
        """
        if isinstance(self.content, str):
            return self
        copies = {}
        for name, tensor in self.content.items():
            key = f"{self.name}/{name}"
            kept = buffers.get(key)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            copies[name] = buffers[key] = _copied(kept, tensor.detach())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        used = {f"{self.name}/{name}" for name in copies}
        for key in [key for key in buffers if key.startswith(f"{self.name}/") and key not in used]:
            del buffers[key]
        return Part(self.name, copies)


class _Threads:
    """Threads that do what `submit` is given, in that order; the end of the context waits for all of it.

    Not an executor of `concurrent.futures`: those refuse work from the moment at which the interpreter begins to end,
    and a checkpoint that is being written in the background just then would be lost.
    """

    def __init__(self, count: int):
        self._jobs: SimpleQueue[tuple[Future[None], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name="checkpoint writer", daemon=False) for _ in range(count)]

    def __enter__(self) -> _Threads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, action: Callable[..., Any], *arguments: Any) -> Future[None]:
        """Call `action` in a thread; the future tells when that is done, or raises what went wrong."""
        job: Future[None] = Future()
        self._jobs.put((job, action, arguments))
        return job

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, action, arguments = item
            try:
                action(*arguments)
                job.set_result(None)
            except BaseException as error:
                job.set_exception(error)
            del item, job, action, arguments  # and the memory they hold, while this waits for the next


def _copied(target: Tensor, source: Tensor) -> Tensor:
    """`target` with the values of `source`."""
    if not (source.device.type == target.device.type == "cpu" and source.is_contiguous() and source.numel()):
        return target.copy_(source, non_blocking=True)
    # one large memory copy: torch's own loop takes about twice as long on a CPU
    np.copyto(target.reshape(-1).view(torch.uint8).numpy(), source.reshape(-1).view(torch.uint8).numpy())
    return target


def write_parts(folder: Path, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Write and sync files; returns their manifest entries {"name", "bytes", "sha256"}.

    Tensor files have the safetensors layout. They are written by this function and not by its library, because that one
    can only hash a second copy in memory or read the file back; digest and disk would then no longer check each other.
    Hashing and syncing run beside the writing (all three release the interpreter): the disk works from the first block
    on, and a save takes about as long as the slowest of the three instead of their sum.

    Raises:
        OSError: the disk refuses.
        CheckpointError: a tensor of a type that the format does not have.
    """
    with ExitStack() as stack:  # files are closed after the threads have ended
        streams = [stack.enter_context((folder / part.name).open("wb")) for part in parts]
        with _Threads(1) as hasher, _Threads(2) as syncer:
            pending = [_write(stream, part, hasher, syncer) for stream, part in zip(streams, parts, strict=True)]
            for job in [syncer.submit(os.fsync, stream.fileno()) for stream in streams]:
                job.result()
            return [finish() for finish in pending]


def write_unsynced(folder: Path, parts: Sequence[Part]) -> Callable[[], list[dict[str, Any]]]:
    """Write and hash files, and leave it to the caller to wait for the disk.

    The tensors may change afterwards. The files are as lasting as DeepSpeed's are after a save: the operating system
    has them, a loss of power may still take them.

    Returns:
        A function that syncs and closes the files and gives their manifest entries; to be called once, by any thread.

    Raises:
        OSError: the disk refuses.
        CheckpointError: a tensor of a type that the format does not have.
    """
    with ExitStack() as stack:
        streams = [stack.enter_context((folder / part.name).open("wb")) for part in parts]
        with _Threads(1) as hasher:
            pending = [_write(stream, part, hasher, None) for stream, part in zip(streams, parts, strict=True)]
            entries = [finish() for finish in pending]
        files = stack.pop_all()

    def settle() -> list[dict[str, Any]]:
        with files:
            faults.point("save.before_sync")
            for stream in streams:
                os.fsync(stream.fileno())
        return entries

    return settle


def _write(
    stream: BufferedWriter, part: Part, hasher: _Threads, syncer: _Threads | None
) -> Callable[[], dict[str, Any]]:
    """Write one file; what is returned waits for the digest and gives the manifest entry."""
    faults.point("save.rank_file")
    digest, size = hashlib.sha256(), 0
    hashing: deque[Future[None]] = deque()
    syncing: Future[None] | None = None
    unsynced = 0
    for block in _blocks(part):
        # what waits to be hashed stays in memory, so not too much
        hashing.append(hasher.submit(digest.update, block))
        if len(hashing) > _AHEAD:
            hashing.popleft().result()
        stream.write(block)
        size += len(block)
        unsynced += len(block)
        if syncer is not None and unsynced >= _BLOCK and (syncing is None or syncing.done()):
            syncing, unsynced = syncer.submit(os.fdatasync, stream.fileno()), 0
    stream.flush()

    def finish() -> dict[str, Any]:
        for job in hashing:
            job.result()
        return {"name": part.name, "bytes": size, "sha256": digest.hexdigest()}

    return finish


def _blocks(part: Part) -> Iterator[memoryview | bytes]:
    if isinstance(part.content, str):
        yield part.content.encode()
        return
    # larger elements first, so that every tensor is aligned, as the library does it
    ordered = sorted(part.content.items(), key=lambda item: (-item[1].element_size(), item[0]))
    yield _header(ordered, part.name)
    for _, tensor in ordered:
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        if not flat.numel():
            continue
        view = memoryview(flat.view(torch.uint8).numpy())
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


def _header(ordered: list[tuple[str, Tensor]], where: str) -> bytes:
    document: dict[str, Mapping[str, Any]] = {}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}, which a checkpoint cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        document[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
