"""Which kernel runs with which launch options, by GPU architecture, dtype, head dim, length, and a mask's block.

How much a mask prunes is not part of the key, only whether there is one; a row's `min_sparsity` is the one threshold.
The rows come from ``table.json`` beside this file; the first row that fits wins, and the last one fits everything, so
an unknown GPU finds an entry too. Rows measured on the user's own GPU (by the tuner) go before them: they are read from
``EFFTRAIN_KERNEL_TABLE``, else from the user's cache folder, under a key made of the GPU's name, Triton's version and a
hash of the kernels' source, so that rows for another GPU or an older kernel are never used. A lookup depends on nothing
but its arguments, the device and these files: all ranks choose the same kernels as long as they read the same file. On
several nodes let `EFFTRAIN_KERNEL_TABLE` name a file on shared storage, written by rank 0's tuner.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import runtime
from ..runtime import ARCHITECTURES

logger = logging.getLogger(__name__)

VARIABLE = "EFFTRAIN_KERNEL_TABLE"
SHIPPED = Path(__file__).with_name("table.json")
SOURCES = ("resident*.py", "lists*.py", "../blocks.py")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
HEAD_DIMS = {16: 32, 32: 32, 48: 64, 64: 64, 80: 80, 96: 128, 128: 128}
"""Head dims of the kernels, and the one of the table whose rows they use."""
LENGTHS = ("64", "128", "256", "list")
KERNELS = ("resident", "list")
BLOCK = 64
MATCHED = ("arch", "dtype", "head_dim", "length", "sparse", "block")


@dataclass(frozen=True)
class Launch:
    """Options of one kernel launch.

    Attributes:
        kernel: "resident" (keys and values of a head are read once, up to 256 tokens) or "list" (block lists).
        num_warps: warps a program.
        num_stages: software-pipeline stages.
        tile: tokens of one step of a program's loop: resident forward: queries; resident backward: keys; list: of the
            walk along a list, at most a block.
        precision: "ieee" or "tf32", for fp32 inputs.
        dkv_warps: list backward: warps of the dK/dV kernel; 0 = `num_warps`.
        dkv_stages: list backward: stages of the dK/dV kernel; 0 = `num_stages`.
    """

    kernel: str
    num_warps: int = 4
    num_stages: int = 2
    tile: int = 64
    precision: str = "ieee"
    dkv_warps: int = 0
    dkv_stages: int = 0


@dataclass(frozen=True)
class Key:
    """What a lookup depends on; also what a compiled variant depends on (batch, heads and counts are not part).

    Attributes:
        arch: one of `runtime.ARCHITECTURES`.
        dtype: one of the values of `DTYPES`.
        head_dim: one of the values of `HEAD_DIMS`.
        length: one of `LENGTHS`; of the longer of queries and keys.
        sparse: a block mask is given.
        block: tokens of its blocks, the tile of the list kernels.
    """

    arch: str
    dtype: str
    head_dim: int
    length: str
    sparse: bool
    block: int = BLOCK


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        prefer: "kernel", or "sdpa" where torch's scaled_dot_product_attention is faster or ours cannot run.
        min_sparsity: share of pruned blocks, 0 to 1, below which SDPA with a dense mask is faster (for `route_for`).
        forward: launch of the forward kernel.
        backward: launch of the backward kernels.
        origin: "shipped" or the file it was read from.
    """

    prefer: str
    min_sparsity: float
    forward: Launch
    backward: Launch
    origin: str = "shipped"


@lru_cache(maxsize=64)
def architecture(device_type: str, index: int = 0) -> str:
    """The table's name for a device, see `runtime.architecture`; "default" where it is no NVIDIA GPU."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "default"
    return runtime.architecture(torch.cuda.get_device_capability(index))


def key_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, length: str, sparse: bool, block: int = BLOCK
) -> Key:
    """The key of a call; `length` as from `bucket`.

    Raises:
        ValueError: a dtype or head dim that the kernels do not have.
    """
    if dtype not in DTYPES or head_dim not in HEAD_DIMS:
        raise ValueError(f"no kernels for {dtype} with head dim {head_dim}; {supported()}")
    arch = architecture(device.type, device.index or 0)
    return Key(arch, DTYPES[dtype], HEAD_DIMS[head_dim], length, sparse, block)


def bucket(q_len: int, kv_len: int) -> str:
    """Length bucket: "64", "128", "256" (at most so many tokens) or "list"."""
    longest = max(q_len, kv_len)
    return "64" if longest <= 64 else "128" if longest <= 128 else "256" if longest <= 256 else "list"


def supported() -> str:
    """The dtypes and head dims of the kernels, for messages."""
    return f"they take {', '.join(DTYPES.values())} and head dims {', '.join(map(str, HEAD_DIMS))}"


def lookup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    q_len: int,
    kv_len: int,
    sparse: bool = False,
    block: int = BLOCK,
) -> Entry:
    """The entry for a call. Never fails for a supported dtype and head dim, whatever the GPU.

    Args:
        device: where the tensors are.
        dtype: of q, k, v.
        head_dim: one of `HEAD_DIMS`.
        q_len: queries.
        kv_len: keys.
        sparse: a block mask is given.
        block: tokens of its blocks.

    Raises:
        ValueError: unsupported dtype or head dim, or a table file that cannot be read.
    """
    return lookup_key(key_for(device, dtype, head_dim, bucket(q_len, kv_len), sparse, block), device)


def lookup_key(key: Key, device: torch.device) -> Entry:
    """The entry of a key; `device` tells which of the user's rows count.

    Raises:
        ValueError: a table file that cannot be read.
    """
    return _lookup(key, device_name(device), os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=512)
def _lookup(key: Key, gpu: str, path: str) -> Entry:
    return resolve(key, (*_user_rows(gpu, path), *shipped_rows()))


def clear_cache() -> None:
    """Forget the files that were read (after the tuner has written new rows)."""
    for cached in (_lookup, shipped_rows, _user_rows):
        cached.cache_clear()


def resolve(key: Key, rows: Iterable[Mapping[str, Any]]) -> Entry:
    """The first row that fits, as an entry."""
    for row in rows:
        if all(_fits(row.get(name), getattr(key, name)) for name in MATCHED):
            return Entry(
                prefer=row.get("prefer", "kernel"),
                min_sparsity=float(row.get("min_sparsity", 0.0)),
                forward=Launch(**row["forward"]),
                backward=Launch(**row["backward"]),
                origin=row.get("origin", "shipped"),
            )
    raise AssertionError(f"the last row of {SHIPPED.name} fits everything, but none was found for {key}")


def _fits(wanted: Any, found: Any) -> bool:
    return wanted is None or found == wanted or (isinstance(wanted, list) and found in wanted)


def keys(architectures: Iterable[str] = ARCHITECTURES) -> Iterable[Key]:
    """Every key of some architectures, for the offline compilation gate and the tuner."""
    for arch in architectures:
        for dtype in DTYPES.values():
            for head_dim in sorted(set(HEAD_DIMS.values())):
                for length in LENGTHS:
                    yield Key(arch, dtype, head_dim, length, False)
                    yield Key(arch, dtype, head_dim, length, True)


@lru_cache(maxsize=1)
def shipped_rows() -> tuple[dict[str, Any], ...]:
    """The rows of ``table.json``, checked."""
    return tuple(_checked(json.loads(SHIPPED.read_text("utf-8"))["rows"], SHIPPED))


def _checked(rows: Any, path: Path) -> list[dict[str, Any]]:
    """Rows with known names and values only.

    Raises:
        ValueError: otherwise; names the file and the row.
    """
    known = {*MATCHED, "prefer", "min_sparsity", "forward", "backward", "note"}
    options = {field.name for field in fields(Launch)}
    if not isinstance(rows, list):
        raise ValueError(f"{path}: rows is a list, found {type(rows).__name__}")
    checked = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not row.keys() <= known or not {"forward", "backward"} <= row.keys():
            raise ValueError(f"{path}, row {number}: needs forward and backward, may have {sorted(known)}; found {row}")
        for side in ("forward", "backward"):
            launch = row[side]
            if not isinstance(launch, dict) or launch.get("kernel") not in KERNELS or not launch.keys() <= options:
                raise ValueError(
                    f"{path}, row {number}: {side} has a kernel of {KERNELS} and {options}; found {launch}"
                )
            lengths = row.get("length") or "list"
            if launch["kernel"] == "resident" and "list" in ([lengths] if isinstance(lengths, str) else lengths):
                raise ValueError(f"{path}, row {number}: the resident kernels take up to 256 tokens")
        if row.get("prefer", "kernel") not in ("kernel", "sdpa"):
            raise ValueError(f'{path}, row {number}: prefer is "kernel" or "sdpa", found {row["prefer"]!r}')
        checked.append({**row, "origin": "shipped" if path == SHIPPED else str(path)})
    return checked


# ---- the user's own measurements


def user_path() -> Path:
    """File of the rows measured on this machine; it need not exist."""
    if path := os.environ.get(VARIABLE):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "efftrain_ds" / "kernel_table.json"


@lru_cache(maxsize=16)
def _device_name(device_type: str, index: int) -> str:
    return torch.cuda.get_device_name(index) if device_type == "cuda" else device_type


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver gives it; "cpu" for the interpreter."""
    return _device_name(device.type, device.index or 0)


@lru_cache(maxsize=1)
def source_hash() -> str:
    """First 12 hex digits of the SHA-256 of the kernels' source."""
    folder = Path(__file__).parent
    texts = [
        file.read_bytes() for pattern in SOURCES for file in sorted((folder / pattern).parent.glob(Path(pattern).name))
    ]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def user_key(gpu: str) -> str:
    """Key of the rows that are valid for a GPU with this Triton and these kernels."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{gpu} | triton {triton} | kernels {source_hash()}"


@lru_cache(maxsize=16)
def _user_rows(gpu: str, path: str) -> tuple[dict[str, Any], ...]:
    """Rows for this GPU, Triton and source. A damaged file is an error where it was asked for by name, else ignored."""
    file = Path(path) if path else user_path()
    try:
        if not path and not file.exists():
            return ()
        tables = json.loads(file.read_text("utf-8"))
        return tuple(_checked(tables.get(user_key(gpu), []), file))
    except (OSError, ValueError, AttributeError) as error:
        if path:
            raise ValueError(f"{VARIABLE}={path} cannot be read: {error}") from error
        logger.warning("ignoring the kernel table %s: %s", file, error)
        return ()


def save_user_rows(gpu: str, rows: Iterable[Mapping[str, Any]], path: Path | None = None) -> Path:
    """Put measured rows into the user's file, in place of the ones under the same key. For the tuner, on rank 0.

    Args:
        gpu: `device_name` of the GPU that was measured.
        rows: as in ``table.json``; the first fitting one wins. A `Launch` is accepted for forward and backward.
        path: default `user_path`.

    Returns:
        The file.

    Raises:
        ValueError: a row with unknown names or values.
    """
    file = path or user_path()
    plain = [
        {name: asdict(value) if isinstance(value, Launch) else value for name, value in row.items() if name != "origin"}
        for row in rows
    ]
    _checked(plain, file)
    try:
        tables = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        tables = {}
    tables[user_key(gpu)] = plain
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(tables, indent=1) + "\n", "utf-8")
    temporary.replace(file)
    clear_cache()
    return file
