"""Offline search for the launch options of the attention kernels on the GPU at hand; never used while training.

Every candidate of a key (dtype, head dim, length bucket, mask or not) is compiled, its machine code is checked (a
variant that spills registers is out, however it times), its result is compared with the reference, and the rest are
timed in turn. The rows go into the user's table file, keyed by GPU name, Triton version and kernel source::

    efftrain bench kernels --tune

On several nodes run it once and let all ranks read one file, see `table`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gate import Compiled, GateCase, check, inspect
from ..timing import measure
from . import table
from .mask import BlockMask
from .patterns import random_blocks
from .reference import attention_reference
from .sdpa import sdpa
from .table import Key, Launch

logger = logging.getLogger(__name__)

SHAPES = {"64": (512, 50), "128": (512, 101), "256": (256, 197), "list": (64, 577)}
"""Images and tokens that a length bucket is timed with; heads fill a width of 384."""

TOLERANCE = {"bf16": 8e-3, "fp16": 1.5e-3, "fp32": 1e-5, "fp64": 1e-10}
SPARSITIES = (0.0, 0.3, 0.5, 0.75)
_DTYPES = {name: dtype for dtype, name in table.DTYPES.items()}


@dataclass
class Tuned:
    """Result for one key.

    Attributes:
        row: for the table.
        times: microseconds of each candidate that was timed, by ("forward" or "backward", launch).
        rejected: why others were not.
        sdpa_us: forward and backward of torch's attention, without a mask or with the dense one.
    """

    key: Key
    row: dict[str, Any]
    times: dict[tuple[str, Launch], float] = field(default_factory=dict)
    rejected: dict[tuple[str, Launch], str] = field(default_factory=dict)
    sdpa_us: float = 0.0


def candidates(key: Key) -> dict[str, list[Launch]]:
    """Launches to try, by "forward" and "backward"."""
    options = tuple(product((4, 8), (1, 2, 3), (64, 32)))
    forward = [Launch("list", *one) for one in options]
    # both backward kernels alike, then one against the other's (4, 2): they hardly influence each other
    pairs = {(warps, stages, warps, stages): None for warps, stages, _ in options}
    pairs |= {(4, 2, warps, stages): None for warps, stages, _ in options if stages < 3}
    pairs |= {(warps, stages, 4, 2): None for warps, stages, _ in options if stages < 3}
    backward = [
        Launch("list", warps, stages, tile, dkv_warps=dkv_warps, dkv_stages=dkv_stages)
        for (warps, stages, dkv_warps, dkv_stages), tile in product(pairs, (64, 32))
    ]
    if key.length != "list":
        tiles = (64,) if key.length == "64" else (64, 128)
        forward += [Launch("resident", *one) for one in product((4, 8), (1, 2), tiles)]
        backward += [Launch("resident", *one) for one in product((4, 8), (1, 2, 3), (16, 32))]
    return {"forward": forward, "backward": backward}


@contextmanager
def compiled_kernels() -> Iterator[list[tuple[str, Compiled, int]]]:
    """Name, code and capability of the kernels that are launched for the first time meanwhile.

    Triton tells of kernels that it compiles or reads from its cache on disk, not of those that the process has already:
    those are forgotten first, so that every variant is seen whoever launched it before.
    """
    from triton import knobs

    forget_compiled()
    seen: list[tuple[str, Compiled, int]] = []

    def listener(*, src: Any, metadata: Mapping[str, Any], metadata_group: Mapping[str, Any], **_: Any) -> None:
        path = next((path for name, path in metadata_group.items() if name.endswith(".cubin")), None)
        if path is not None:
            code = inspect(Path(path).read_bytes(), int(metadata["shared"]))
            seen.append((str(src.name), code, int(metadata["target"].arch)))

    before = knobs.compilation.listener
    knobs.compilation.listener = listener
    try:
        yield seen
    finally:
        knobs.compilation.listener = before


def forget_compiled() -> None:
    """Empty the caches of compiled variants of the attention kernels in this process; the one on disk stays."""
    from . import lists_bwd, lists_fwd, resident_bwd, resident_fwd

    kernels = (
        lists_fwd.forward_kernel,
        lists_bwd.dq_kernel,
        lists_bwd.dkv_kernel,
        resident_fwd.forward_kernel,
        resident_bwd.backward_kernel,
    )
    for kernel in kernels:
        caches = getattr(kernel, "device_caches", None)  # interpreted kernels have none
        if caches is not None:
            caches.clear()


class Problem:
    """Inputs, reference and launchers for one key."""

    def __init__(self, key: Key, device: torch.device, images: int, tokens: int, heads: int, sets: int = 3):
        self.key, self.device, self.block, self.sets = key, device, key.block, sets
        dtype, dim = _DTYPES[key.dtype], key.head_dim
        random = [torch.Generator(device).manual_seed(index) for index in range(sets)]
        shape = (images, tokens, 3, heads, dim)
        self.qkv = [torch.randn(shape, dtype=dtype, device=device, generator=g) for g in random]
        self.dout = [torch.randn_like(qkv[:, :, 0]) for qkv in self.qkv]
        self.scale = dim**-0.5
        self.out = torch.empty_like(self.dout[0])
        lse_dtype = torch.promote_types(dtype, torch.float32)
        self.lse = torch.empty(images, heads, tokens, dtype=lse_dtype, device=device)
        self.dqkv = torch.empty_like(self.qkv[0])
        self.mask = self.masked(0.5) if key.sparse else BlockMask.full(1, tokens, tokens, key.block, device)

    def masked(self, sparsity: float) -> BlockMask:
        """Random blocks for each head, the diagonal kept."""
        _, tokens, _, heads, _ = self.qkv[0].shape
        blocks = -(-tokens // self.block)
        keep = random_blocks(
            (blocks, blocks), 1 - sparsity, heads, torch.Generator().manual_seed(11), per="head", always=None
        )
        return BlockMask(keep.to(self.device), tokens, tokens, self.block)

    def forward(self, launch: Launch, index: int) -> None:
        """Run the forward kernel on one input set."""
        q, k, v = self.qkv[index].unbind(2)
        mask, end = self.mask, (self.block, self.scale, launch)
        if launch.kernel == "resident":
            from . import resident

            resident.forward(q, k, v, self.out, self.lse, mask.row_bits if self.key.sparse else None, *end)
        else:
            from . import lists

            lists.forward(q, k, v, self.out, self.lse, *self.lists()[:2], *end)

    def backward(self, launch: Launch, index: int) -> None:
        """Run the backward kernels; output and log-sum-exp are those of set 0, which the time does not depend on."""
        q, k, v = self.qkv[index].unbind(2)
        tensors = (q, k, v, self.out, self.lse, self.dout[index], *self.dqkv.unbind(2))
        mask, end = self.mask, (self.block, self.scale, launch)
        if launch.kernel == "resident":
            from . import resident

            resident.backward(*tensors, mask.row_bits if self.key.sparse else None, *end)
        else:
            from . import lists

            lists.backward(*tensors, *self.lists(), *end)

    def lists(self) -> tuple[Tensor | None, ...]:
        """Counts and indices by rows and by columns; None without a mask, as in a model: that is another variant."""
        mask = self.mask
        lists = (mask.row_cnt, mask.row_idx, mask.col_cnt, mask.col_idx)
        return lists if self.key.sparse else (None,) * len(lists)

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp and dqkv of the first two images of set 0, in float64."""
        qkv = self.qkv[0][:2].double().requires_grad_()
        out, lse = attention_reference(*qkv.unbind(2), self.mask.to_dense(), self.scale)
        (grad,) = torch.autograd.grad(out, qkv, self.dout[0][:2].double())
        return out.detach(), lse, grad

    def sdpa(self, index: int) -> None:
        """Forward and backward of torch's attention from the same packed qkv, with the mask if there is one."""
        qkv = self.qkv[index].detach().requires_grad_()
        out = sdpa(*qkv.unbind(2), self.mask.keep if self.key.sparse else None, self.block, self.scale)
        torch.autograd.grad(out, qkv, self.dout[index])


def tune(
    key: Key,
    device: torch.device,
    *,
    shape: tuple[int, int, int] | None = None,
    launches: Mapping[str, Sequence[Launch]] | None = None,
    **effort: Any,
) -> Tuned:
    """Find the best launches of one key on a device.

    Args:
        key: as from `table.key_for`.
        device: a GPU; the CPU works under the interpreter, for tests.
        shape: images, tokens, heads; default from `SHAPES`.
        launches: candidates by "forward" and "backward", default `candidates`.
        **effort: passed to `timing.measure`.

    Raises:
        RuntimeError: every candidate of the forward or of the backward pass was rejected.
    """
    images, tokens = SHAPES[key.length]
    images, tokens, heads = shape or (images, tokens, max(1, 384 // key.head_dim))
    problem = Problem(key, device, images, tokens, heads, int(effort.setdefault("sets", 3)))
    tuned = Tuned(key, {})
    expected = problem.reference()
    best: dict[str, Launch] = {}
    for side in ("forward", "backward"):
        run = getattr(problem, side)
        good = []
        for launch in (launches or candidates(key))[side]:
            reason = _reason(key, side, launch, problem, expected)
            if reason is None:
                good.append(launch)
            else:
                tuned.rejected[side, launch] = reason
        if not good:
            reasons = "; ".join(f"{launch}: {text}" for (_, launch), text in tuned.rejected.items())
            raise RuntimeError(f"no launch of the {side} kernels works for {key}: {reasons}")
        times = measure({str(n): partial(run, launch) for n, launch in enumerate(good)}, device, **effort)
        for n, launch in enumerate(good):
            tuned.times[side, launch] = times[str(n)].median
        best[side] = min(good, key=lambda launch: tuned.times[side, launch])
        run(best[side], 0)  # the backward candidates need a right output
    tuned.row = {"arch": key.arch, "dtype": key.dtype, "head_dim": key.head_dim, "length": key.length}
    tuned.row |= {"sparse": key.sparse, "block": key.block, "forward": best["forward"], "backward": best["backward"]}
    tuned.row |= _against_sdpa(problem, best, tuned, effort)
    return tuned


def _reason(
    key: Key, side: str, launch: Launch, problem: Problem, expected: tuple[Tensor, Tensor, Tensor]
) -> str | None:
    """Why a launch is out: does not compile or run, spills, or computes something else; None where it is good."""
    try:
        with compiled_kernels() as compiled:
            target = (problem.out, problem.lse) if side == "forward" else (problem.dqkv,)
            for tensor in target:
                tensor.fill_(float("nan"))
            getattr(problem, side)(launch, 0)
        wrong = [f"{name}: {text}" for name, code, arch in compiled for text in check(code, _rules(arch))]
        if problem.device.type == "cuda" and not compiled:
            wrong.append("its machine code was not seen")
        wrong += _errors(key, side, problem, expected)
    except Exception as error:  # the compiler and the driver raise many kinds
        wrong = [f"{type(error).__name__}: {str(error).strip()[:200]}"]
    return "; ".join(wrong) or None


def _rules(arch: int) -> GateCase:
    """No spills and enough shared memory; whether wgmma is used shows in the time."""
    return GateCase("", None, {}, {}, capability=arch, wgmma=False)


def _errors(key: Key, side: str, problem: Problem, expected: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """Results that differ from the reference."""
    out, lse, grad = expected
    pairs = {"out": (problem.out[:2], out), "lse": (problem.lse[:2], lse)}
    if side == "backward":
        pairs = {name: (problem.dqkv[:2, :, i], grad[:, :, i]) for i, name in enumerate(("dq", "dk", "dv"))}
    wrong = []
    for name, (found, reference) in pairs.items():
        error = float((found.double() - reference).norm() / reference.norm())
        if not error <= TOLERANCE[key.dtype]:  # NaN too
            wrong.append(f"wrong {name}: relative error {error:.1e}")
    return wrong


def _against_sdpa(
    problem: Problem, best: Mapping[str, Launch], tuned: Tuned, effort: Mapping[str, Any]
) -> dict[str, Any]:
    """The row's `prefer`, and with a mask the sparsity from which the kernels beat SDPA with a dense mask."""

    def ours(index: int) -> None:
        problem.forward(best["forward"], index)
        problem.backward(best["backward"], index)

    calls: dict[str, Callable[[int], object]] = {"ours": ours, "sdpa": problem.sdpa}
    if not problem.key.sparse:
        times = measure(calls, problem.device, **effort)
        tuned.sdpa_us = times["sdpa"].median
        return {"prefer": "kernel" if times["ours"].median <= times["sdpa"].median else "sdpa"}
    gains = []
    for sparsity in SPARSITIES:
        problem.mask = problem.masked(sparsity)
        times = measure(calls, problem.device, **effort)
        tuned.sdpa_us = times["sdpa"].median
        gains.append((1 - problem.mask.density, times["sdpa"].median / times["ours"].median))
    return break_even(gains)


def break_even(gains: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Choice from pairs (sparsity, SDPA's time over ours), ascending: linear between the two around a ratio of 1."""
    if gains[-1][1] < 1:
        return {"prefer": "sdpa", "min_sparsity": 1.0}
    last = next((i for i in reversed(range(len(gains))) if gains[i][1] < 1), None)
    if last is None:
        return {"prefer": "kernel", "min_sparsity": 0.0}
    (low, below), (high, above) = gains[last], gains[last + 1]
    return {"prefer": "kernel", "min_sparsity": round(low + (high - low) * (1 - below) / (above - below), 3)}


def store(device: torch.device, tuned: Sequence[Tuned], path: Path | None = None) -> Path:
    """Put the rows into the user's table, in place of earlier ones for the same keys and before the others."""
    file = path or table.user_path()
    gpu = table.device_name(device)
    names = table.MATCHED
    new = {tuple(result.row[name] for name in names) for result in tuned}
    try:
        old = json.loads(file.read_text("utf-8"))[table.user_key(gpu)]
    except (OSError, ValueError, KeyError):
        old = []
    kept = [row for row in old if tuple(row.get(name) for name in names) not in new]
    return table.save_user_rows(gpu, [*(result.row for result in tuned), *kept], file)
