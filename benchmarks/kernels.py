"""The Triton kernels against their peers on one GPU: correctness first, then device time in turn.

    python benchmarks/kernels.py [--minutes 8.5] [--only TEXT] [--out F]    one NVIDIA GPU (H100 or H200 meant)
    python benchmarks/kernels.py --dry                                      every step on a CPU, tiny shapes, no figures

The result is written after every case, so a run that is cut off leaves what it measured. With --only it is written
where --out says and nowhere else.

The peer of a row is the fastest correct one of those timed, and the row names it. "ratio" is peer over ours, median and
range of 5 rounds in turn. "floor" is the larger of bytes over the measured copy bandwidth and FLOPs over the measured
rate of an 8192^3 bf16 product. A variant whose output or gradients are wrong is not timed. "must" and "aim" are this
project's targets for the ratio; the "noise" row times one variant against itself.

"50 %" and so on is the share of pruned blocks; "density" of a row is the share of the scores that its mask keeps. Peers
get q, k and v as separate tensors, which is their best form; in rows "/ packed" they take them out of one tensor and
give one gradient, as in timm's models and as ours does. "sm_mhz" is the range of the clock while a row was timed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_clocks import Clocks, smi, watch
from kernel_plan import (
    CROP_PEERS,
    CROP_TARGETS,
    CROP_TOLERANCE,
    DENSITY_TOLERANCE,
    DRY_TOKENS,
    DRY_TOLERANCE,
    FLEX_TARGET,
    PEER_TOLERANCE,
    SHAPES,
    TARGETS,
    TOLERANCE,
    Shape,
)

PASSES = ("forward", "backward", "fwd+bwd")


class Bench:
    """State of one run: device, ceilings, rows, deadline."""

    def __init__(self, device: torch.device, minutes: float, only: Sequence[str] = (), dry: bool = False):
        self.device, self.dry, self.only = device, dry, tuple(only)
        self.clocks: Clocks | None = None
        self.seen_mhz: list[float] | None = None
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.ceilings = {"tflops": 1.0, "tbs": 1.0}
        self.effort: dict[str, Any] = {"sets": 3, "rounds": 5, "repeats": 10, "warmup": 20}
        if dry:
            self.effort = {"sets": 1, "rounds": 1, "repeats": 1, "warmup": 1}

    def wanted(self, name: str) -> bool:
        """A case that was asked for, while there is time; notes it otherwise."""
        if self.only and not any(text in name for text in self.only):
            return False
        if time.monotonic() > self.end:
            self.notes.append(f"{name}: not run, the time was over")
            return False
        return True

    def guarded(self, name: str, run: Callable[[], None]) -> None:
        """Run one case; an exception becomes a note, so that the other cases still run."""
        if not self.wanted(name):
            return
        begin = time.monotonic()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # else FlexAttention of the later cases finds its limit of recompilations used up
        try:
            run()
        except Exception as error:
            if self.dry:
                raise
            self.notes.append(f"{name}: FAILED {type(error).__name__}: {str(error).strip()[:300]}")
            print(self.notes[-1], flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {name}: {time.monotonic() - begin:.0f} s", flush=True)

    def measure(self, calls: dict[str, Callable[[int], object]], graph: bool = True) -> Any:
        """`kernels.timing.measure` with this run's effort."""
        from efftrain_ds.kernels.timing import measure

        begin = time.monotonic()
        times = measure(calls, self.device, graph=graph, **self.effort)
        self.seen_mhz = None if self.clocks is None else self.clocks.since(begin)
        return times

    def measure_ceilings(self) -> None:
        """Rates of a large bf16 product and of a large copy."""
        size, count = (64, 1 << 16) if self.dry else (8192, 1 << 31)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty(count, dtype=torch.bfloat16, device=self.device).zero_()
        target = torch.empty_like(source)
        times = self.measure({"product": lambda _: a @ b, "copy": lambda _: target.copy_(source)}, graph=False)
        self.ceilings["tflops"] = 2 * size**3 / times["product"].median / 1e6
        self.ceilings["tbs"] = 2 * source.numel() * 2 / times["copy"].median / 1e6
        text = f"ceilings: {self.ceilings['tflops']:.0f} TFLOP/s (bf16 product), {self.ceilings['tbs']:.2f} TB/s (copy)"
        print("dry run, no figures" if self.dry else text, flush=True)

    def add(
        self,
        case: str,
        step: str,
        times: dict[str, Any],
        work: tuple[float, float],
        *,
        target: tuple[float, float] | None = None,
        peers: Sequence[str] | None = None,
        **more: Any,
    ) -> None:
        """One row: ours against the fastest of `peers` (default all); `work` is (bytes, FLOPs) of ours."""
        from efftrain_ds.kernels.timing import ratio

        own = times["ours"]
        if own.note and f"{case}, {step}: {own.note}" not in self.notes:
            self.notes.append(f"{case}, {step}: {own.note}")
        floor = max(work[0] / self.ceilings["tbs"], work[1] / self.ceilings["tflops"]) / 1e6
        row: dict[str, Any] = {
            "case": case,
            "pass": step,
            "ours_us": own.median,
            "graph": own.graph,
            "tbs": work[0] / own.median / 1e6,
            "tflops": work[1] / own.median / 1e6,
            "floor_us": floor,
            "percent_of_floor": 100 * floor / own.median,
            "peers_us": {name: timing.median for name, timing in times.items() if name != "ours"},
        }
        if self.seen_mhz is not None:
            row["sm_mhz"] = self.seen_mhz
        names = [name for name in (peers if peers is not None else row["peers_us"]) if name in times]
        if names:
            best = min(names, key=lambda name: times[name].median)
            found = ratio(times[best], own)
            row |= {"peer": best, "ratio": found.median, "ratio_range": [found.low, found.high]}
            if target is not None:
                verdict = "aim" if found.median >= target[1] else "must" if found.median >= target[0] else "MISSED"
                row |= {"must": target[0], "aim": target[1], "reached": verdict}
        self.rows.append({**row, **more})
        print(f"{case}, {step}: ran, with {len(times) - 1} peers" if self.dry else line(self.rows[-1]), flush=True)


HEAD = f"{'case':36s} {'pass':9s} {'ours us':>9s} {'peer us':>9s} {'ratio':>6s} {'range':>13s} {'floor':>6s}"
HEAD += f" {'TB/s':>6s} {'TFLOP/s':>7s} {'must':>5s} {'aim':>5s}  reached, peer"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    text = f"{row['case']:36s} {row['pass']:9s} {row['ours_us']:9.1f}"
    if "ratio" in row:
        low, high = row["ratio_range"]
        text += f" {row['peers_us'][row['peer']]:9.1f} {row['ratio']:6.2f} {f'{low:.2f}-{high:.2f}':>13s}"
    else:
        text += f" {'':9s} {'':6s} {'':13s}"
    text += f" {row['percent_of_floor']:5.0f}% {row['tbs']:6.2f} {row['tflops']:7.0f}"
    text += f" {row['must']:5.2f} {row['aim']:5.2f}" if "must" in row else f" {'':5s} {'':5s}"
    return f"{text}  {row.get('reached', '')} {row.get('peer', '')}".rstrip()


# ---- attention


def attention_work(shape: tuple[int, int, int, int], size: int, kept: float, step: str) -> tuple[float, float]:
    """Bytes and FLOPs that a pass needs at least: q, k, v, out and their gradients once; 2 and 5 products."""
    b, n, h, d = shape
    unit, product = b * n * h * d * size, 2 * b * h * n * n * d * kept
    return {
        "forward": (4 * unit, 2 * product),
        "backward": (8 * unit, 5 * product),
        "fwd+bwd": (12 * unit, 7 * product),
    }[step]


def inputs_of(bench: Bench, shape: Shape, mask: Any = None, heads: int | None = None) -> Any:
    """Inputs of a shape, tiny ones in a dry run."""
    from kernel_peers import Inputs

    tokens, images = (DRY_TOKENS[shape.tokens], 2) if bench.dry else (shape.tokens, shape.images)
    heads = max(1, (heads or shape.heads) // 3) if bench.dry else heads or shape.heads
    return Inputs((images, tokens, heads, shape.dim), shape.dtype, bench.device, mask, bench.effort["sets"])


def correct(bench: Bench, case: str, alternatives: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The alternatives whose output and gradients agree with float64; the others are noted."""
    good = []
    for alternative in alternatives:
        limit = TOLERANCE[dtype] * (1 if alternative.name.startswith("ours") else PEER_TOLERANCE)
        limit = max(limit, DRY_TOLERANCE) if bench.dry else limit
        try:
            errors = alternative.errors()
            alternative.forward(0)  # without gradients other code is compiled
        except Exception as error:  # a backend that does not take this shape, or is not compiled
            if bench.dry or alternative.name.startswith("ours"):
                raise
            bench.notes.append(f"{case}, {alternative.name}: {type(error).__name__}: {str(error).strip()[:160]}")
            continue
        if max(errors.values()) <= limit:
            good.append(alternative)
        else:
            found = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
            bench.notes.append(f"{case}, {alternative.name}: WRONG, errors {found}, at most {limit:.1e}; not timed")
            print(bench.notes[-1], flush=True)
    return good


def compare(bench: Bench, case: str, alternatives: Sequence[Any], passes: Sequence[str] = PASSES, **more: Any) -> None:
    """Check and time alternatives, the first of which is ours, and add a row for each pass."""
    inputs = alternatives[0].inputs
    good = correct(bench, case, alternatives, inputs.dtype)
    if not good or good[0] is not alternatives[0]:
        return
    flex = [alternative.name for alternative in good if "Flex" in alternative.name]
    packed = [alternative.name for alternative in good if alternative.name.endswith(", packed")]
    if inputs.mask is not None:
        more |= {"density": inputs.kept(), "block_density": inputs.mask.density}
    for step in passes:
        method = {"forward": "forward", "backward": "backward", "fwd+bwd": "both"}[step]
        calls = {alternative.name: getattr(alternative, method) for alternative in good}
        times = bench.measure(calls, graph=step != "backward")
        for alternative in good:
            alternative.drop()
        work = attention_work(inputs.shape, inputs.dtype.itemsize, inputs.kept(), step)
        peers = [name for name in times if name not in ("ours", *flex, *packed)]
        bench.add(case, step, times, work, target=TARGETS.get((case, step)), peers=peers, **more)
        if packed:
            name = f"{case} / packed"
            bench.add(name, step, times, work, target=TARGETS.get((name, step)), peers=packed, **more)
        if flex:
            bench.add(f"{case} / Flex", step, times, work, target=FLEX_TARGET, peers=flex, **more)


def random_mask(bench: Bench, shape: Shape, sparsity: float) -> Any:
    """Random blocks of patches for each head with the diagonal kept, and on top the row and the column of CLS.

    CLS comes last, in a block of its own with one token: it does not count as a block that could be pruned.

    Raises:
        ValueError: the mask keeps another share of the scores than it is named after.
    """
    from efftrain_ds.kernels.attention import BlockMask
    from efftrain_ds.kernels.attention.patterns import random_blocks

    tokens = DRY_TOKENS[shape.tokens] if bench.dry else shape.tokens
    heads = max(1, shape.heads // 3) if bench.dry else shape.heads
    blocks = tokens // 64
    patches = random_blocks((blocks, blocks), 1 - sparsity, heads, torch.Generator().manual_seed(7))
    keep = torch.nn.functional.pad(patches, (0, 1, 0, 1), value=True)
    mask = BlockMask(keep.to(bench.device), tokens, tokens)
    density = float(mask.to_dense().double().mean())
    if abs(density - (1 - sparsity)) > DENSITY_TOLERANCE and not bench.dry:
        raise ValueError(f"{shape.name}: a mask for {sparsity:.0%} pruned keeps {density:.3f} of the scores")
    return mask


def window_mask(bench: Bench, shape: Shape) -> Any:
    """Windows of 7 x 7 patches over 8 x 8 tiles, CLS global."""
    from efftrain_ds.kernels.attention import BlockMask
    from efftrain_ds.kernels.attention.patterns import windows

    grid = 16 if bench.dry else shape.grid
    return BlockMask(windows((grid, grid), 7, extra=1).to(bench.device), grid**2 + 1, grid**2 + 1)


def attention_cases(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and functions of the attention cases, the ones with targets first."""
    from kernel_peers import flex_peers, layer_alternatives, ours, packed_peers, sdpa_peers

    def dense(shape: Shape, case: str) -> None:
        inputs = inputs_of(bench, shape)
        packed = packed_peers(inputs, bench.dry) if shape.tokens > 256 else []  # where SDPA is our route too
        compare(bench, case, [ours(inputs), *sdpa_peers(inputs, bench.dry), *packed])

    def lists(shape: Shape, case: str) -> None:
        inputs = inputs_of(bench, shape)
        compare(bench, case, [ours(inputs, "auto" if reference_only() else "list"), *sdpa_peers(inputs, bench.dry)])

    def layer(shape: Shape, case: str, compiled: bool) -> None:
        inputs = inputs_of(bench, shape)
        compare(bench, case, layer_alternatives(inputs, compiled, bench.dry), ("fwd+bwd",))

    def half(shape: Shape, case: str) -> None:
        inputs = inputs_of(bench, shape, heads=shape.heads // 2)
        compare(bench, case, [ours(inputs), *sdpa_peers(inputs_of(bench, shape), bench.dry)])

    def sparse(shape: Shape, case: str, make: Callable[[], Any], flex: bool) -> None:
        mask = make()
        inputs = inputs_of(bench, shape, mask)
        alternatives = [ours(inputs), *sdpa_peers(inputs, bench.dry)]
        alternatives += flex_peers(inputs, bench.dry) if flex else []
        compare(bench, case, alternatives)

    small, middle, large = (SHAPES[f"DeiT-S {tokens}"] for tokens in (197, 577, 1025))
    yield "noise", lambda: noise(bench, middle)  # first what is cheap and what the other rows are judged by
    yield "mask rebuild", lambda: rebuild(bench, large)
    yield (name := f"{small.name} dense"), lambda name=name: dense(small, name)
    for how in ("eager", "compiled"):
        name = f"{small.name} qkv to proj, {how}"
        yield name, lambda name=name, how=how: layer(small, name, how == "compiled")
    yield (name := f"{small.name} half the heads"), lambda name=name: half(small, name)
    for shape in (middle, large, SHAPES["DeiT-B 577"], SHAPES["DeiT-B 1025"]):
        for percent in (50, 75, 90):
            make = lambda shape=shape, percent=percent: random_mask(bench, shape, percent / 100)  # noqa: E731
            name, flex = f"{shape.name} {percent} %", shape.heads == 6
            yield name, lambda s=shape, name=name, make=make, flex=flex: sparse(s, name, make, flex)
        make = lambda shape=shape: window_mask(bench, shape)  # noqa: E731
        name, flex = f"{shape.name} windows", shape.heads == 6
        yield name, lambda s=shape, name=name, make=make, flex=flex: sparse(s, name, make, flex)
        yield (name := f"{shape.name} dense"), lambda s=shape, name=name: dense(s, name)
    for shape in (middle, large):
        yield (name := f"{shape.name} dense, list kernels"), lambda s=shape, name=name: lists(s, name)
    for name in ("DeiT-B 197", "16 heads of 80, 257", "12 heads of 32, 197", "DeiT-S 65", "DeiT-S 101"):
        yield f"{name} dense", lambda s=SHAPES[name], name=name: dense(s, f"{name} dense")
    yield "DeiT-S 197 fp16 dense", lambda: dense(SHAPES["DeiT-S 197 fp16"], "DeiT-S 197 fp16 dense")
    fp16 = SHAPES["DeiT-S 577 fp16"]
    yield (
        "DeiT-S 577 fp16 75 %",
        lambda: sparse(fp16, "DeiT-S 577 fp16 75 %", lambda: random_mask(bench, fp16, 0.75), False),
    )


def reference_only() -> bool:
    """Plain torch is forced: the kernels are not to be asked for by name."""
    return os.environ.get("EFFTRAIN_KERNELS") == "reference"


def noise(bench: Bench, shape: Shape) -> None:
    """One variant against itself: differences below this ratio mean nothing."""
    from kernel_peers import ours

    inputs = inputs_of(bench, shape, random_mask(bench, shape, 0.5))
    first, second = ours(inputs), ours(inputs, name="ours again")
    if len(correct(bench, "noise", [first, second], inputs.dtype)) < 2:
        return
    times = bench.measure({"ours": first.both, "ours again": second.both})
    bench.add("noise", "fwd+bwd", times, attention_work(inputs.shape, 2, inputs.kept(), "fwd+bwd"))


def rebuild(bench: Bench, shape: Shape) -> None:
    """A new mask into the buffers of the old one, one layer."""
    mask = random_mask(bench, shape, 0.75)
    new = random_mask(bench, shape, 0.5).keep
    if not torch.equal(mask.update_(new).row_cnt, new.sum(-1)):
        raise RuntimeError("the lists do not follow the mask")
    times = bench.measure({"ours": lambda _: mask.update_(new)}, graph=False)
    bench.add("mask rebuild", "update", times, (0.0, 0.0))


# ---- low-frequency crop


def crop(bench: Bench, size: int) -> None:
    """The fused crop against the Fourier routes, two products and another filter."""
    from kernel_peers import crop_alternatives, crop_reference, photographs, relative_error

    images, side, result = (2, 32, size // 8) if bench.dry else (256, 224, size)
    pixels = [photographs(images, side, bench.device, index) for index in range(bench.effort["sets"])]
    case = f"crop 224 to {size}, {images} images"
    reference = crop_reference(pixels[0], result)
    calls: dict[str, Callable[[int], object]] = {}
    for name, function in crop_alternatives(result, bench.device, bench.dry).items():
        error = relative_error(function(pixels[0])[: len(reference)], reference)
        # peers leave the corner frequency out (most of a tiny image's error); another filter is no comparison
        limit = {"ours": CROP_TOLERANCE * (2 if bench.dry else 1), "interpolate": float("inf")}.get(
            name, CROP_PEERS * (3 if bench.dry else 1)
        )
        if error > limit:
            bench.notes.append(f"{case}, {name}: WRONG, error {error:.1e}, at most {limit:.1e}; not timed")
            print(bench.notes[-1], flush=True)
            if name == "ours":
                return
            continue
        calls[name] = lambda index, function=function: function(pixels[index])
    times = bench.measure(calls)
    work = (images * 3 * (side**2 + 2 * result**2), 6 * images * (result * side**2 + result**2 * side))
    for name in calls:
        if name != "ours":
            bench.add(case, "forward", times, work, target=CROP_TARGETS[name], peers=[name])
    rows = [image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for image in pixels]
    own = crop_alternatives(result, bench.device, bench.dry)["ours"]
    error, limit = relative_error(own(rows[0])[: len(reference)], reference), CROP_TOLERANCE * (2 if bench.dry else 1)
    if error > limit:
        bench.notes.append(f"{case}, HWC, ours: WRONG, error {error:.1e}, at most {limit:.1e}; not timed")
        print(bench.notes[-1], flush=True)
        return
    bench.add(f"{case}, HWC", "forward", bench.measure({"ours": lambda index: own(rows[index])}), work)


def cases(bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every case by name, in the order of a run."""
    for size in (96, 128, 160, 192):
        yield f"crop 224 to {size}", lambda size=size: crop(bench, size)
    yield from attention_cases(bench)


# ---- run


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver, versions and clocks of the GPU."""
    import triton

    facts: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type != "cuda":
        return facts
    facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        command = smi(device, query, "csv,noheader")
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        facts |= dict(zip(query.split(","), [value.strip() for value in found.split(",")], strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        facts["driver_version"] = "unknown"
    return facts


def save(bench: Bench, facts: dict[str, Any], args: argparse.Namespace) -> Path:
    """Write what was measured so far."""
    from common import store

    command = ["python benchmarks/kernels.py", *(f"--only {shlex.quote(text)}" for text in args.only)]
    result = {"gpu": facts, "ceilings": bench.ceilings, "rows": bench.rows, "notes": bench.notes}
    return store("kernels", " ".join(command), result, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan, print the table, write the result.

    Returns:
        0; 1 where a variant of ours was wrong or a case failed; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="start no new case after so long")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases with it in their name")
    parser.add_argument("--dry", action="store_true", help="every step on a CPU with tiny shapes; writes nothing")
    parser.add_argument("--out", metavar="FILE", help="result file (default: results/kernels.json; none with --only)")
    args = parser.parse_args(argv)
    if args.dry:
        # before Triton is imported; EFFTRAIN_KERNELS=reference runs the steps in plain torch
        os.environ.setdefault("EFFTRAIN_KERNELS", "triton")
        if os.environ["EFFTRAIN_KERNELS"] == "triton":
            os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("benchmarks/kernels.py needs an NVIDIA GPU; --dry runs its steps on a CPU.", file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.dry else torch.device("cuda", torch.cuda.current_device())
    begin = time.monotonic()
    bench = Bench(device, args.minutes, args.only, args.dry)
    facts = gpu(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    bench.clocks = watch(device)
    path = None
    try:
        bench.measure_ceilings()
        print("" if args.dry else HEAD, flush=True)
        for name, run in cases(bench):
            bench.guarded(name, run)
            if not args.dry and (args.out or not args.only):
                path = save(bench, facts, args)
    finally:
        if bench.clocks is not None:
            bench.clocks.close()
    print("\n".join(bench.notes))
    failed = [note for note in bench.notes if "FAILED" in note or ", ours: WRONG" in note]
    missed = [row["case"] for row in bench.rows if row.get("reached") == "MISSED"]
    below = "" if args.dry else f"{len(missed)} below must, "
    print(f"{len(bench.rows)} rows, {below}{len(failed)} failures, {time.monotonic() - begin:.0f} s")
    if path is not None:
        print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
