"""``efftrain bench``: time what this package computes on the device at hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

_DTYPES = ("bf16", "fp16", "fp32")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser("bench", help="time the GPU kernels on this machine, or tune them")
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    kernels = what.add_parser(
        "kernels",
        help="attention and low-frequency crop against torch",
        description="Check and time the Triton kernels against torch's own on this GPU. --tune searches launch options "
        "for it first, takes some minutes, and writes them to the table that every run on this machine reads.",
    )
    kernels.add_argument("--tune", action="store_true", help="search the best launch options and store them")
    kernels.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the attention (default bf16)")
    kernels.add_argument(
        "--head_dim", type=int, choices=(32, 64, 80, 128), default=64, help="of the attention (default 64)"
    )
    kernels.add_argument("--json", action="store_true", help="print JSON")
    kernels.set_defaults(func=run_kernels)
    return parser


class Shape(NamedTuple):
    """An attention that is timed: images, tokens, and the share of pruned blocks."""

    images: int
    tokens: int
    sparsity: float


SHAPES = (Shape(256, 197, 0.0), Shape(64, 577, 0.0), Shape(64, 577, 0.75), Shape(32, 1025, 0.75))
CROPS = ((256, 224, 128), (256, 224, 192))
WIDTH = 384
PEERS = 3
"""Times the error of ours: a peer may round more, but must compute the same thing."""


def run_kernels(args: argparse.Namespace) -> int:
    """Time (and with ``--tune`` first tune) the kernels.

    Returns:
        0; 1 where a kernel gave a wrong result.

    Raises:
        ConfigError: this machine cannot run the kernels.
    """
    import torch

    from ..core.errors import ConfigError
    from ..kernels import runtime

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = runtime.why_not(device.type, device.index or 0) if device.type == "cuda" else "no GPU was found"
    if reason is not None:
        raise ConfigError(
            "efftrain bench kernels: needs an NVIDIA GPU of compute capability 8.0 or above, and Triton: "
            f"{reason}. Training works without them: plain torch takes their place."
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "head_dim": args.head_dim,
    }
    show = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    show(f"{result['device']}, torch {result['torch']}, {args.dtype}, head dim {args.head_dim}")
    if args.tune:
        result["tuned"] = tune(device, dtype, args.head_dim, show)
    result["rows"] = compare(device, dtype, args.head_dim, show)
    if args.json:
        print(json.dumps(result, indent=1))
    return 0 if all(row["correct"] for row in result["rows"]) else 1


def compare(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    show: Callable[[str], None],
    shapes: Sequence[Shape] = SHAPES,
    crops: Sequence[tuple[int, int, int]] = CROPS,
    **effort: Any,
) -> list[dict[str, Any]]:
    """Rows of the table: forward and backward of attention, and the crop, each after a check of its result.

    Args:
        device: where.
        dtype: of the attention.
        head_dim: D; as many heads as fill a width of 384.
        show: prints a line.
        shapes: of the attention.
        crops: images, side and side of the result.
        **effort: passed to `kernels.timing.measure`.
    """
    rows = []
    show(f"{'':44s} {'ours us':>9s} {'torch us':>9s} {'ratio':>6s}  range")
    sets = int(effort.setdefault("sets", 3))
    for shape in shapes:
        name = f"attention fwd+bwd, {shape.images} x {shape.tokens} tokens"
        name += f", {100 * shape.sparsity:.0f} % pruned" if shape.sparsity else ""
        rows.append(_row(name, _attention(device, dtype, head_dim, shape, sets), device, effort))
        show(_line(rows[-1]))
    for images, side, size in crops:
        name = f"low-frequency crop, {images} x {side} to {size} px"
        rows.append(_row(name, _crop(device, images, side, size, sets), device, effort))
        show(_line(rows[-1]))
    return rows


class Variant(NamedTuple):
    """One way to compute something.

    Attributes:
        call: from the number of an input set to the results.
        error: the largest relative error of the results of set 0; None where there is nothing to compare with.
        limit: the most that it may be.
    """

    call: Callable[[int], Any]
    error: Callable[[Any], float] | None
    limit: float


def _row(name: str, variants: dict[str, Variant], device: torch.device, effort: dict[str, Any]) -> dict[str, Any]:
    """Compare the results, then time: ours is first, peers that cannot run here or that are wrong are left out.

    Where ours is wrong nothing is timed: the row then says so and has no times.
    """
    from ..kernels.timing import measure, ratio

    usable = {}
    for peer, variant in variants.items():
        try:
            result = variant.call(0)
        except RuntimeError:
            if peer == "ours":
                raise
            continue
        if variant.error is None or variant.error(result) <= variant.limit:  # not so for NaN
            usable[peer] = variant.call
        elif peer == "ours":
            return {"name": name, "correct": False, "us": {}}
    times = measure(usable, device, **effort)
    row: dict[str, Any] = {"name": name, "correct": True, "us": {peer: time.median for peer, time in times.items()}}
    peers = [peer for peer in times if peer != "ours"]
    if not peers:
        return row
    best = min(peers, key=lambda peer: times[peer].median)
    found = ratio(times[best], times["ours"])
    return {**row, "peer": best, "ratio": found.median, "range": [found.low, found.high]}


def _line(row: dict[str, Any]) -> str:
    if not row["correct"]:
        return f"{row['name']:44s} WRONG RESULT, not timed"
    text = f"{row['name']:44s} {row['us']['ours']:9.1f}"
    if "peer" not in row:
        return f"{text}  no peer ran here"
    text += f" {row['us'][row['peer']]:9.1f} {row['ratio']:6.2f}"
    return f"{text}  {row['range'][0]:.2f}-{row['range'][1]:.2f}, {row['peer']}"


def _attention(device: torch.device, dtype: torch.dtype, head_dim: int, shape: Shape, sets: int) -> dict[str, Variant]:
    """Variants by name, compared with float64 on the first images: ours with its mask, the peers without one."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ..kernels.attention import BlockMask, attention, attention_reference
    from ..kernels.attention.patterns import random_blocks

    images, tokens, sparsity = shape
    heads = max(1, WIDTH // head_dim)
    random = torch.Generator(device).manual_seed(0)
    size = (images, tokens, 3, heads, head_dim)
    qkv = [torch.randn(size, generator=random, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    dout = [torch.randn_like(one[:, :, 0].detach()) for one in qkv]
    mask = None
    if sparsity:
        blocks = -(-tokens // 64)
        keep = random_blocks(
            (blocks, blocks), 1 - sparsity, heads, torch.Generator().manual_seed(0), per="head", always=None
        )
        mask = BlockMask(keep.to(device), tokens, tokens)

    def ours(index: int) -> Any:
        out = attention(qkv[index], mask)
        return out, torch.autograd.grad(out, qkv[index], dout[index])[0]

    def peer(backend: SDPBackend) -> Callable[[int], Any]:
        separate = [[x.detach().transpose(1, 2).contiguous().requires_grad_() for x in one.unbind(2)] for one in qkv]
        grads = [one.transpose(1, 2).contiguous() for one in dout]

        def run(index: int) -> Any:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*separate[index])
            return out, *torch.autograd.grad(out, separate[index], grads[index])

        return run

    def error(masked: bool) -> Callable[[Any], float]:
        def largest(found: Any) -> float:
            few = qkv[0][:2].detach().double().requires_grad_()
            dense = mask.to_dense() if masked and mask is not None else None
            expected, _ = attention_reference(*few.unbind(2), dense, head_dim**-0.5)
            wanted = (expected, torch.autograd.grad(expected, few, dout[0][:2].double())[0])
            if not masked:  # heads first, and gradients one by one
                found = (found[0].transpose(1, 2), torch.stack([x.transpose(1, 2) for x in found[1:]], 2))
            return max(_relative_error(x[:2], y) for x, y in zip(found, wanted, strict=True))

        return largest

    limit = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}.get(dtype, 1e-5)
    names = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    names |= {} if device.type == "cuda" else {"math": "MATH"}
    backends = {f"SDPA {name}": getattr(SDPBackend, backend) for name, backend in names.items()}
    peers = {name: Variant(peer(backend), error(False), PEERS * limit) for name, backend in backends.items()}
    return {"ours": Variant(ours, error(True), limit), **peers}


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def _crop(device: torch.device, images: int, side: int, size: int, sets: int) -> dict[str, Variant]:
    """Variants by name: ours is compared with the Fourier definition, the products with the same ones in float64."""
    import torch
    import torch.nn.functional as F

    from ..kernels.lowfreq_crop import lowfreq_crop
    from ..kernels.lowfreq_crop.reference import fourier_crop, matmul_crop

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(-1, 1, 1)
    random = torch.Generator(device).manual_seed(0)
    pixels = [
        torch.randint(0, 256, (images, 3, side, side), generator=random, device=device, dtype=torch.uint8)
        for _ in range(sets)
    ]
    half = torch.float16 if device.type == "cuda" else torch.float32

    def ours(index: int) -> Any:
        return lowfreq_crop(pixels[index], size, mean=mean, std=std, out_dtype=torch.bfloat16)

    def products(index: int) -> Any:
        formula: dict[str, Any] = {"exact": False, "scale": scale, "shift": shift}
        return matmul_crop(pixels[index], (size, size), compute_dtype=half, out_dtype=torch.bfloat16, **formula)

    def interpolate(index: int) -> Any:
        x = pixels[index].float() * scale + shift
        return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).to(torch.bfloat16)

    def error(found: Any) -> float:
        return _relative_error(found[:2], fourier_crop(few, (size, size)) * scale.double() + shift.double())

    def error_of_products(found: Any) -> float:
        exact = matmul_crop(few, (size, size), exact=False, compute_dtype=torch.float64, out_dtype=torch.float64)
        return _relative_error(found[:2], exact * scale.double() + shift.double())

    few = pixels[0][:2]
    return {
        "ours": Variant(ours, error, 4e-3),
        "two matmuls": Variant(products, error_of_products, PEERS * 4e-3),
        "interpolate": Variant(interpolate, None, 0.0),  # another filter
    }


def tune(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    show: Callable[[str], None],
    lengths: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Search launch options for all lengths, with and without a mask, and store them.

    Args:
        device: the GPU.
        dtype: of the attention.
        head_dim: D.
        show: prints a line.
        lengths: length buckets, default all.

    Returns:
        The file and its new rows.
    """
    from dataclasses import asdict

    from ..kernels.attention import table, tuner

    found, failed = [], {}
    for length in lengths or table.LENGTHS:
        for sparse in (False, True):
            key = table.key_for(device, dtype, head_dim, length, sparse)
            what = f"{'up to ' + length if length != 'list' else 'more'} tokens, {'mask' if sparse else 'no mask'}"
            try:
                tuned = tuner.tune(key, device)
            except RuntimeError as error:
                failed[what] = str(error)
                show(f"{what}: {error}")
                continue
            found.append(tuned)
            best = ", ".join(
                f"{side} {launch.kernel} {launch.num_warps} warps {launch.num_stages} stages tile {launch.tile}: "
                f"{tuned.times[side, launch]:.1f} us"
                for side, launch in ((side, tuned.row[side]) for side in ("forward", "backward"))
            )
            show(f"{what}: {best}; SDPA both {tuned.sdpa_us:.1f} us; {tuned.row['prefer']}")
            show(f"  {len(tuned.times)} timed, {len(tuned.rejected)} rejected")
    if not found:
        return {"file": None, "rows": [], "failed": failed}
    path = tuner.store(device, found)
    show(f"stored in {path}")
    rows = [
        {name: asdict(value) if name in ("forward", "backward") else value for name, value in one.row.items()}
        for one in found
    ]
    return {"file": str(path), "rows": rows, "failed": failed}
