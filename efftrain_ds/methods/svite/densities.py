"""Which weights are masked, how many of their entries live, and the first masks.

A density is the kept share of a weight, in (0, 1]. Layers are named by the clean name of their weight
("blocks.0.attn.qkv.weight"). Every function takes shapes, so that a grid of blocks counts like a weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ModelError
from ...core.rng import torch_rng

Shapes = Mapping[str, tuple[int, ...]]

RULES = ("erk", "er", "uniform")
SCOPES = ("all", "encoder")

_ENCODER = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_NEVER = ("bias", "gumbel")  # 2-D tables of biases, and token scorers


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers add (DeepSpeed and DDP: leading "module", compile: "_orig_mod")."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def maskable(model: nn.Module, scope: str = "all", *, exclude: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Weights of a model that take a mask, in the model's order.

    Args:
        model: any model for "all"; one with blocks ``attn`` + ``mlp`` for "encoder". May lie on the meta device.
        scope: "all" is every weight of a linear layer or 2-D convolution, classifier and patch embedding included (as
            the SViTE code does); "encoder" is the four matrices of every block (attn.qkv, attn.proj, mlp.fc1, mlp.fc2).
        exclude: names of modules or weights that stay dense (e.g. a token scorer).

    Returns:
        Shape by weight name: [out, in] or [out, in / groups, kh, kw].

    Raises:
        ConfigError: unknown scope.
        ModelError: nothing to mask, or a layer that holds its weights in a way this method does not know.
    """
    if scope not in SCOPES:
        raise ConfigError(f'scope is "{scope}", allowed: {", ".join(SCOPES)}')
    modules = {clean_name(name): module for name, module in model.named_modules()}
    blocks = [n for n, m in modules.items() if hasattr(m, "attn") and hasattr(m, "mlp")]
    if scope == "encoder" and not blocks:
        raise ModelError(f'{type(model).__name__}: scope "encoder" found no block with the parts "attn" and "mlp"')
    found: dict[str, tuple[int, ...]] = {}
    for full, parameter in model.named_parameters():
        name = clean_name(full)
        owner, _, leaf = name.rpartition(".")
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # a ZeRO-3 partition is flat
        if len(shape) not in (2, 4) or any(word in name for word in _NEVER) or _below(name, exclude):
            continue
        if getattr(modules.get(owner), "efftrain_dense", False):
            continue
        block = next((b for b in blocks if not b or name.startswith(b + ".")), None)
        if scope == "encoder" and block is None:
            continue
        if leaf != "weight" or not isinstance(modules.get(owner), (nn.Linear, nn.Conv2d)):
            raise ModelError(
                f"{name} [{', '.join(map(str, shape))}]: {type(modules.get(owner)).__name__} is no linear layer or 2-D "
                "convolution; masks do not know how it uses this weight"
            )
        if scope == "encoder" and owner[len(block or "") :].lstrip(".") not in _ENCODER:
            raise ModelError(f'{name}: scope "encoder" knows {", ".join(_ENCODER)} of a block, not this layer')
        found[name] = shape
    if not found:
        raise ModelError(f'{type(model).__name__}: scope "{scope}" found no weight to mask')
    return found


def _below(name: str, roots: Collection[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


@dataclass(frozen=True)
class Erk:
    """Densities by ERK: 1 for the layers in `dense`, `epsilon` x (sum of sides / product of sides)^power elsewhere."""

    epsilon: float
    dense: frozenset[str]
    density: dict[str, float]


def erk(shapes: Shapes, density: float, *, power: float = 1.0, dense: Collection[str] = ()) -> Erk:
    """Erdos-Renyi-kernel densities (RigL, Evci et al. 2020): wide layers keep a smaller share than narrow ones.

    Layers whose share would pass 1 stay dense, and the rest pays for them, so the mean over all entries is `density`.

    Args:
        shapes: of the layers; a convolution counts all four sides.
        density: kept share over all entries.
        power: of the ratio; 0 gives equal densities.
        dense: layers that stay dense in any case.

    Raises:
        ConfigError: density outside (0, 1].
        ModelError: the layers in `dense` alone pass the budget.
    """
    _check_density(density)
    raw = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in shapes.items()}
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    fixed = {name for name in shapes if name in dense}
    while True:
        rest = [name for name in shapes if name not in fixed]
        if not rest:
            return Erk(0.0, frozenset(fixed), {name: 1.0 for name in shapes})
        budget = density * sum(numel.values()) - sum(numel[name] for name in fixed)
        if budget <= 0:
            raise ModelError(
                f"density {density:g} leaves nothing for {rest[0]}: the dense layers ({', '.join(sorted(fixed))}) hold "
                f"{sum(numel[name] for name in fixed) / sum(numel.values()):.3f} of all entries"
            )
        epsilon = budget / sum(raw[name] * numel[name] for name in rest)
        largest = max(raw[name] for name in rest)
        if epsilon * largest <= 1:
            shares = {name: 1.0 if name in fixed else epsilon * raw[name] for name in shapes}
            return Erk(epsilon, frozenset(fixed), shares)
        fixed |= {name for name in rest if raw[name] == largest}


def layer_densities(
    shapes: Shapes, density: float, rule: str = "erk", power: float = 1.0, *, dense: Collection[str] = ()
) -> dict[str, float]:
    """Density of every layer.

    Args:
        shapes: of the layers.
        density: kept share of the model.
        rule: "erk"; "er" (live entries proportional to the sum of the sides, Mocanu et al. 2018: a layer that would
            pass 1 is cut there and nothing pays for it, so the total is then below the target); "uniform".
        power: of ERK.
        dense: layers that stay dense: paid for by the others under "erk", not counted under "er" and "uniform".

    Raises:
        ConfigError: unknown rule, or a density outside (0, 1].
        ModelError: see `erk`.
    """
    _check_density(density)
    if rule == "erk":
        return erk(shapes, density, power=power, dense=dense).density
    rest = {name: shape for name, shape in shapes.items() if name not in dense}
    if rule == "uniform":
        return {name: density if name in rest else 1.0 for name in shapes}
    if rule != "er":
        raise ConfigError(f'density rule "{rule}" is unknown, allowed: {", ".join(RULES)}')
    total = sum(math.prod(shape) for shape in rest.values())
    epsilon = density * total / max(1, sum(sum(shape) for shape in rest.values()))
    return {n: min(1.0, epsilon * sum(s) / math.prod(s)) if n in rest else 1.0 for n, s in shapes.items()}


def exact_counts(shapes: Shapes, densities: Mapping[str, float]) -> dict[str, int]:
    """Live entries of every layer: density x entries, rounded half up.

    Raises:
        ModelError: a layer would have no live entry.
    """
    counts = {}
    for name, shape in shapes.items():
        total = math.prod(shape)
        counts[name] = min(total, math.floor(densities[name] * total + 0.5))
        if counts[name] < 1:
            raise ModelError(f"{name}: density {densities[name]:.2e} leaves none of {total} entries")
    return counts


def custom_densities(shapes: Shapes, counts: Mapping[str, int]) -> dict[str, float]:
    """Densities of live counts that the user gives (e.g. those of stored masks).

    Raises:
        ConfigError: a layer is missing or unknown, or a count does not fit its layer.
    """
    for kind, names in (("missing", shapes.keys() - counts.keys()), ("unknown", counts.keys() - shapes.keys())):
        if names:
            raise ConfigError(f"custom densities: {kind} layer {sorted(names)[0]}")
    for name, shape in shapes.items():
        if not 1 <= counts[name] <= math.prod(shape):
            raise ConfigError(
                f"custom densities: {name} has {counts[name]} live entries, allowed 1..{math.prod(shape)}"
            )
    return {name: counts[name] / math.prod(shape) for name, shape in shapes.items()}


def grid_shapes(shapes: Shapes, block: int) -> dict[str, tuple[int, int]]:
    """Grids [out / block, in / block] of weights that are masked in square blocks.

    Raises:
        ModelError: a side of a weight is no multiple of `block`, or the weight is no matrix.
    """
    grids = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] % block or shape[1] % block:
            raise ModelError(f"{name} {list(shape)}: blocks of {block} x {block} need a matrix with sides in multiples")
        grids[name] = (shape[0] // block, shape[1] // block)
    return grids


def mask_rng(seed: int, name: str, *labels: int | str) -> torch.Generator:
    """Host generator for the masks of one layer: a function of the seed and the labels, so equal on all ranks."""
    return torch_rng("cpu", seed, "svite", name, *labels)


def random_mask(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Boolean mask of exactly `count` live entries at uniformly random places, on the generator's device."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=generator.device)
    mask[torch.randperm(mask.numel(), generator=generator, device=generator.device)[:count]] = True
    return mask.view(shape)


def exploration(union: Mapping[str, Tensor]) -> float:
    """Share R_s of entries that were ever live (ITOP, Liu et al. 2021), from the running OR of the masks."""
    return sum(int(u.sum()) for u in union.values()) / max(1, sum(u.numel() for u in union.values()))


def mask_digest(masks: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and bits of boolean masks; equal on two ranks only if their masks are."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(masks):
        digest.update(f"{name}{tuple(masks[name].shape)}".encode())
        digest.update(np.packbits(masks[name].detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _check_density(density: float) -> None:
    if not 0 < density <= 1:  # False for NaN too
        raise ConfigError(f"density is {density}, allowed: above 0, at most 1")
