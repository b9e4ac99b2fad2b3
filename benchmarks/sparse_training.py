"""Step time and memory of sparse models against the dense one: structured, token selection, both, and masks.

    python benchmarks/sparse_training.py [--quick] [--rounds 5] [--compile] [--out F]

All models live in one process and take turns; a ratio is taken round by round, to the dense step of the same round. A
step is forward, backward and AdamW. The encoder (the blocks alone, forward and backward, on the tokens that they see)
is timed beside it. Memory is counted from the live tensors after a step: parameters, gradients and optimizer state.
On a CPU, ratios are of the process's CPU time, which others on the machine disturb less than the wall time beside it.
MACs are those of the layers as they are, and of the live entries of masks, which save no time: that row stands here to
show it.

Aim: the encoder's time within 10 % of its MACs, and its optimizer state equal to its live share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import ROOT, spread, store
from torch import Tensor, nn

from efftrain_ds.methods.svite.accounting import live_counts
from efftrain_ds.methods.svite.densities import exact_counts, layer_densities, mask_rng, maskable, random_mask
from efftrain_ds.methods.svite.s2vite_slots import live_count
from efftrain_ds.models.masked import mask_layers, masks_of
from efftrain_ds.models.tokens import insert_selector, selector_of
from efftrain_ds.models.units import compact_, units_of

MODEL = "vit_small_patch16_224"
AIM = 0.10
_UNITS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Arm:
    """One configuration.

    Attributes:
        about: in words.
        units: density of heads and of neurons; None keeps all.
        keep: share of the tokens; None has no selector.
        masked: density of masks on the encoder's weights; None has none.
    """

    about: str
    units: float | None = None
    keep: float | None = None
    masked: float | None = None


ARMS: dict[str, Arm] = {
    "dense": Arm("nothing left out"),
    "structured-0.6": Arm("heads and neurons, density 0.6", units=0.6),
    "structured-0.4": Arm("heads and neurons, density 0.4", units=0.4),
    "tokens-0.9": Arm("token selection, keep 0.9", keep=0.9),
    "tokens-0.7": Arm("token selection, keep 0.7", keep=0.7),
    "tokens-0.5": Arm("token selection, keep 0.5", keep=0.5),
    "both-0.6-0.7": Arm("structured 0.6, keep 0.7", units=0.6, keep=0.7),
    "both-0.4-0.5": Arm("structured 0.4, keep 0.5", units=0.4, keep=0.5),
    "masked-0.5": Arm("masked entries, density 0.5", masked=0.5),
}


class Subject:
    """A model with its optimizer and inputs.

    Args:
        arm: what it is.
        args: of the command line.
        device: where it lives.
    """

    def __init__(self, arm: Arm, args: argparse.Namespace, device: torch.device):
        self.arm, self.device = arm, device
        torch.manual_seed(0)
        model = timm.create_model(MODEL, img_size=args.resolution, depth=args.depth, num_classes=args.classes)
        model = _sparse(model, arm).to(device)
        self.model = model
        self.sizes = units_of(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=device.type == "cuda")
        self.images = torch.randn(args.batch, 3, args.resolution, args.resolution, device=device)
        self.labels = torch.randint(args.classes, (args.batch,), device=device)
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        selector = selector_of(model)
        self.kept = tokens if selector is None else selector.kept(tokens)
        self.tokens = torch.randn(args.batch, self.kept, model.embed_dim, device=device, requires_grad=True)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if args.compile else model
        self._blocks: Callable[[Tensor], Tensor] = torch.compile(model.blocks) if args.compile else model.blocks

    def _precision(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            loss = F.cross_entropy(self._forward(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()

    def encode(self) -> None:
        """Forward and backward of the blocks."""
        self.tokens.grad = None
        for parameter in self.model.blocks.parameters():
            parameter.grad = None
        with self._precision():
            self._blocks(self.tokens).float().mean().backward()

    def seconds(self, what: Callable[[], None]) -> tuple[float, float]:
        """Wall and CPU time of one call."""
        _synchronize(self.device)
        begin, used = time.perf_counter(), time.process_time()
        what()
        _synchronize(self.device)
        return time.perf_counter() - begin, time.process_time() - used

    def macs(self) -> tuple[int, int]:
        """Forward MACs of an image: whole model, blocks alone; of live entries where weights are masked."""
        counts = live_counts(self.model, masks_of(self.model))
        patches = self.model.patch_embed.num_patches
        total = counts.macs(patches, self.model.num_prefix_tokens, self.kept)
        scorer = 0 if self.arm.keep is None else patches * self.model.embed_dim
        return total + scorer, total - patches * counts.patch - counts.head

    def memory(self) -> dict[str, int]:
        """Bytes of live tensors after a step; "encoder_optimizer" is the state of the weights that units make up."""
        self.step()
        parameters = dict(self.model.named_parameters())
        state = {name: _bytes(self.optimizer.state[p].values()) for name, p in parameters.items()}
        found = {
            "parameters": _bytes(parameters.values()),
            "gradients": _bytes(p.grad for p in parameters.values()),
            "optimizer": sum(state.values()),
            "encoder_optimizer": sum(size for name, size in state.items() if _in_units(name)),
        }
        if self.device.type == "cuda":
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            found["step_peak"] = torch.cuda.max_memory_allocated() - before  # activations, gradients, temporaries
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def live_weights(self) -> int:
        """Live entries of the weights that units make up: those stored, without what a mask has zeroed."""
        masks = masks_of(self.model)
        named = ((name, p) for name, p in self.model.named_parameters() if _in_units(name))
        return sum(int(masks[name].sum()) if name in masks else p.numel() for name, p in named)


def _sparse(model: nn.Module, arm: Arm) -> nn.Module:
    if arm.units is not None:
        density = arm.units
        keep = {
            name: (range(live_count(u.heads, density)), range(live_count(u.neurons, density)))
            for name, u in units_of(model).items()
        }
        model = compact_(model, keep)
    if arm.keep is not None:
        model = insert_selector(model, arm.keep)
    if arm.masked is not None:
        shapes = maskable(model, "encoder")
        counts = exact_counts(shapes, layer_densities(shapes, arm.masked))
        masks = {name: random_mask(shapes[name], counts[name], mask_rng(0, name)) for name in shapes}
        mask_layers(model, masks)
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
    return model


def _in_units(name: str) -> bool:
    return name.startswith("blocks.") and any(f".{layer}." in name for layer in _UNITS)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


Times = dict[str, dict[str, list[float]]]
"""Seconds of every round by arm and by what was timed; "_cpu" marks CPU time."""


def measure(subjects: dict[str, Subject], rounds: int) -> Times:
    """Time all arms in turn; the order is moved on, so that no arm always comes first."""
    times: Times = {name: {} for name in subjects}
    for turn in range(-1, rounds):  # the first one warms up
        names = list(subjects)
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            subject = subjects[name]
            for what, call in (("step", subject.step), ("encoder", subject.encode)):
                wall, cpu = subject.seconds(call)
                if turn >= 0:
                    times[name].setdefault(what, []).append(wall)
                    times[name].setdefault(f"{what}_cpu", []).append(cpu)
            subject.optimizer.zero_grad(set_to_none=True)
        print(f"round {turn + 1} of {rounds}" if turn >= 0 else "warm", file=sys.stderr, flush=True)
    return times


def summarise(subjects: dict[str, Subject], times: Times) -> dict[str, dict[str, Any]]:
    """Times, MACs and bytes of each arm, and all of them over dense."""
    memory = {name: subject.memory() for name, subject in subjects.items()}
    dense, base = subjects["dense"], memory["dense"]
    tail = "" if dense.device.type == "cuda" else "_cpu"
    summary: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        macs = dict(zip(("step", "encoder"), subject.macs(), strict=True))
        whole = dict(zip(("step", "encoder"), dense.macs(), strict=True))
        ratios = {
            what: spread([a / b for a, b in zip(found, times["dense"][what], strict=True)])
            for what, found in times[name].items()
        }
        mac_ratio = {what: macs[what] / whole[what] for what in macs}
        sizes = next(iter(subject.sizes.values()))
        live = subject.live_weights() / dense.live_weights()
        state = memory[name]["encoder_optimizer"] / base["encoder_optimizer"]
        over = ratios[f"encoder{tail}"]["median"] / mac_ratio["encoder"] - 1
        total = sum(memory[name][key] for key in ("parameters", "gradients", "optimizer"))
        summary[name] = {
            "about": subject.arm.about,
            "heads": sizes.heads,
            "neurons": sizes.neurons,
            "tokens": subject.kept,
            "ms": {what: spread([1e3 * t for t in found]) for what, found in times[name].items()},
            "macs": macs,
            "mac_ratio": mac_ratio,
            "time_ratio": {what: ratios[f"{what}{tail}"] for what in ("step", "encoder")},
            "wall_ratio": {what: ratios[what] for what in ("step", "encoder")},
            "encoder_time_over_macs": over,
            "time_aim_met": None if subject.arm.masked is not None or name == "dense" else bool(over <= AIM),
            "bytes": memory[name],
            "bytes_total_ratio": total / sum(base[key] for key in ("parameters", "gradients", "optimizer")),
            "encoder_live_share": live,
            "encoder_optimizer_ratio": state,
            "memory_aim_met": None if subject.arm.masked is not None else abs(state - live) < 0.005,
        }
    return summary


def markdown(summary: dict[str, dict[str, Any]]) -> str:
    """A table; ratios are medians over dense."""
    lines = [
        "| Arm | Heads, neurons, tokens | Step ms | x time | x MACs | Encoder x time (min to max) | x MACs "
        "| time over MACs | Within 10 % | Encoder optimizer x | Live share | All state x |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "no", None: "-"}
    for name, row in summary.items():
        encoder = row["time_ratio"]["encoder"]
        masked = row["time_aim_met"] is None and name != "dense"
        cells = [
            f"{name}: {row['about']}",
            f"{row['heads']}, {row['neurons']}, {row['tokens']}",
            f"{row['ms']['step']['median']:.0f}",
            f"{row['time_ratio']['step']['median']:.3f}",
            f"{row['mac_ratio']['step']:.3f}",
            f"{encoder['median']:.3f} ({encoder['min']:.3f} to {encoder['max']:.3f})",
            f"{row['mac_ratio']['encoder']:.3f}",
            f"{100 * row['encoder_time_over_macs']:+.0f} %",
            "not claimed" if masked else words[row["time_aim_met"]],
            f"{row['encoder_optimizer_ratio']:.3f}",
            f"{row['encoder_live_share']:.3f}" + (" stored" if masked else ""),
            f"{row['bytes_total_ratio']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all arms, store the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--arms", default=",".join(ARMS), help=f"which of {', '.join(ARMS)}; dense is always there")
    parser.add_argument("--batch", type=int, default=128 if gpu else 16)
    parser.add_argument("--depth", type=int, default=12 if gpu else 2, help="blocks of width 384 with 6 heads")
    parser.add_argument("--resolution", type=int, default=224, help="side in pixels; 224 makes 196 patches")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30 if gpu else 5)
    parser.add_argument("--compile", action="store_true", help="torch.compile for all arms")
    parser.add_argument("--quick", action="store_true", help="batch 2, 1 block, 64 pixels, 2 rounds: does it run?")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.depth, args.resolution, args.rounds = 2, 1, 64, 2
    names = [name for name in ARMS if name == "dense" or name in args.arms.split(",")]
    if unknown := [name for name in args.arms.split(",") if name not in ARMS]:
        parser.error(f"--arms: unknown {', '.join(unknown)}; there are {', '.join(ARMS)}")
    device = torch.device("cuda" if gpu else "cpu")
    subjects = {name: Subject(ARMS[name], args, device) for name in names}
    times = measure(subjects, args.rounds)
    summary = summarise(subjects, times)
    settings = {
        "model": MODEL,
        "depth": args.depth,
        "batch": args.batch,
        "resolution": args.resolution,
        "rounds": args.rounds,
        "precision": "bf16 autocast" if gpu else "fp32",
        "compiled": args.compile,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    path = store("sparse_training", " ".join(["python", *sys.argv]), {**settings, "arms": summary}, args.out)
    dense = statistics.median(times["dense"]["step"])
    print(f"{markdown(summary)}\n\ndense step {1e3 * dense:.0f} ms, {settings['precision']}")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    main()
