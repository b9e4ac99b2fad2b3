"""The small form of a sparse model: only live heads and neurons, and its token selector, as two files.

``compact.safetensors`` has the weights in fp32, ``compact.json`` what to build: a timm model, the heads and neurons of
each of its blocks (they may differ), the selector, and how an image becomes an input. `load_compact` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import nn

from ..core.errors import CheckpointError, ModelError
from ..core.strict import StrictModel
from ..models.adapters import create_model
from ..models.tokens import insert_selector, selector_of
from ..models.unit_export import fold_dead_biases
from ..models.units import BlockUnits, Keep, compact_, head_rows, parts_of, units_of

WEIGHTS, CONFIG = "compact.safetensors", "compact.json"
FORMAT = 1
NOT_FROM_FILES = frozenset(
    {
        *("dynamic_img_size", "num_classes", "scriptable", "exportable"),
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    }
)
"""Arguments of timm that are set here, or would make it load a file that another file names."""


class BlockSize(StrictModel):
    """Size of one block."""

    heads: int = Field(ge=1)
    """Attention heads; their width is that of the full model."""
    neurons: int = Field(ge=1)
    """MLP neurons."""


class TokenSettings(StrictModel):
    """The token selector."""

    keep: float = Field(gt=0, le=1)
    """Share of the tokens that the blocks see."""
    select: str = "gather"
    """"gather" or "mask"."""


class InputSettings(StrictModel):
    """How an image becomes an input."""

    size: tuple[int, int, int]
    """Channels, height and width."""
    mean: tuple[float, ...]
    """By channel, of values in 0..1."""
    std: tuple[float, ...]
    """By channel."""
    interpolation: str
    """Of the resize."""
    crop: float
    """Side of the centre crop over that of the resized image."""


class CompactConfig(StrictModel):
    """Content of ``compact.json``."""

    format: int = FORMAT
    """Version of this form."""
    model: str
    """Name for `timm.create_model`."""
    arguments: dict[str, Any]
    """Its arguments; they make the model of full width."""
    num_classes: int = Field(ge=1)
    """Outputs of the classifier."""
    blocks: dict[str, BlockSize]
    """Every block by its module name."""
    tokens: TokenSettings | None = None
    """The token selector, if there is one."""
    input: InputSettings
    """Input of the model."""
    labels: list[str] | None = None
    """Names of the classes."""


def shaped(model: nn.Module, units: Mapping[str, tuple[int, int]], tokens: Mapping[str, Any] | None) -> nn.Module:
    """Bring timm's model into the architecture of a sparse one, in place.

    Args:
        model: of full width, real or on the meta device.
        units: heads and neurons of the blocks that have fewer.
        tokens: arguments of `models.tokens.insert_selector`; None for a model without a selector.

    Raises:
        ModelError: the model does not take them.
    """
    full = units_of(model) if units else {}
    for name, (heads, neurons) in units.items():
        if name not in full or not (1 <= heads <= full[name].heads and 1 <= neurons <= full[name].neurons):
            raise ModelError(
                f"{name}: {heads} heads and {neurons} neurons; {type(model).__name__} has {full.get(name)}"
            )
    if units:
        compact_(model, {name: (range(heads), range(neurons)) for name, (heads, neurons) in units.items()})
    return model if tokens is None else insert_selector(model, **tokens)


@torch.no_grad()
def trimmed(model: nn.Module) -> nn.Module:
    """Take out heads and neurons that have no effect but a constant, in place; the constant goes into a bias.

    These are heads whose W_v rows are zero and neurons whose fc2 column is zero, as masks of units leave them. Models
    that are not made of such blocks stay as they are.
    """
    try:
        parts, units = parts_of(model), units_of(model)
    except ModelError:
        return model
    keep: dict[str, tuple[list[int], list[int]]] = {}
    for name, (attn, mlp) in parts.items():
        dead = [h for h in range(units[name].heads) if not attn.qkv.weight[head_rows(units[name], [h], "v")].any()]
        heads = [h for h in range(units[name].heads) if h not in dead] or [0]
        neurons = mlp.fc2.weight.any(dim=0).nonzero().flatten().tolist() or [0]
        if (len(heads), len(neurons)) != (units[name].heads, units[name].neurons):
            fold_dead_biases(model, {name: dead})
            keep[name] = (heads, neurons)
    return compact_(model, keep) if keep else model


def sizes_of(units: Mapping[str, BlockUnits]) -> dict[str, tuple[int, int]]:
    """(heads, neurons) by block."""
    return {name: (block.heads, block.neurons) for name, block in units.items()}


def slots_of(states: Mapping[str, Any], small: Mapping[str, BlockUnits], full: Mapping[str, BlockUnits]) -> Keep:
    """Which unit of the full model each slot holds: as a method has stored it, else one after the other.

    The logits are the same in any order; with the stored one the full model has its zeros where the run had dead units.

    Args:
        states: of the methods, by name.
        small: sizes now.
        full: sizes of the full model.
    """
    plain = {name: (list(range(size.heads)), list(range(size.neurons))) for name, size in small.items()}
    for state in states.values():
        slots = state.get("slots") if isinstance(state, dict) else None
        if not isinstance(slots, dict) or set(slots) != set(small):
            continue
        found: dict[str, tuple[list[int], list[int]]] = {}
        for name, kinds in slots.items():
            if not isinstance(kinds, dict) or not {"heads", "neurons"} <= set(kinds):
                break
            pair = [[int(unit) for unit in kinds[kind]] for kind in ("heads", "neurons")]
            limits = [(small[name].heads, full[name].heads), (small[name].neurons, full[name].neurons)]
            if all(
                len({*p}) == len(p) == n and min(p) >= 0 and max(p) < m for p, (n, m) in zip(pair, limits, strict=True)
            ):
                found[name] = (pair[0], pair[1])
        if len(found) == len(small):
            return found
    return plain


def write(model: nn.Module, config: CompactConfig, folder: Path) -> None:
    """Write both files; the model's parameters and persistent buffers are stored on the host in fp32."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config.model_dump(), indent=1) + "\n", encoding="utf-8")


def config_of(
    model: nn.Module, name: str, arguments: Mapping[str, Any], num_classes: int, inputs: InputSettings, labels: Any
) -> CompactConfig:
    """Describe a small model.

    Args:
        model: what `shaped` or `trimmed` returned.
        name: for `timm.create_model`.
        arguments: of it, for the model of full width.
        num_classes: outputs of the classifier.
        inputs: how an image becomes an input.
        labels: names of the classes, or None.

    Raises:
        ModelError: the model is not made of blocks with heads and neurons.
    """
    selector = selector_of(model)
    tokens = None if selector is None else TokenSettings(keep=selector.keep, select=selector.select)
    return CompactConfig(
        model=name,
        arguments={key: value for key, value in arguments.items() if key not in NOT_FROM_FILES},
        num_classes=num_classes,
        blocks={block: BlockSize(heads=h, neurons=n) for block, (h, n) in sizes_of(units_of(model)).items()},
        tokens=tokens,
        input=inputs,
        labels=None if labels is None else list(labels),
    )


def read_config(folder: str | Path) -> CompactConfig:
    """Read ``compact.json``.

    Raises:
        CheckpointError: it cannot be read, or is not of this form.
    """
    path = Path(folder) / CONFIG
    try:
        config = CompactConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    if config.format != FORMAT:
        raise CheckpointError(f"{path}: format {config.format}, this version reads format {FORMAT}")
    return config


def load_compact(folder: str | Path, **kwargs: Any) -> nn.Module:
    """The small model with its weights, in fp32 and evaluation mode, on the host.

    Example:
        >>> model = load_compact("out")  # of: efftrain export runs/X --output out --format compact
        >>> logits = model(images)       # [N, 3, H, W], normalised as read_config("out").input says

    Args:
        folder: with ``compact.json`` and ``compact.safetensors``.
        **kwargs: further arguments of `timm.create_model` that change no parameter.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are of another model.
        ModelError: timm cannot build the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, path = read_config(folder), Path(folder) / WEIGHTS
    arguments = {key: value for key, value in config.arguments.items() if key not in NOT_FROM_FILES}
    size = config.input.size[-1]
    model = create_model(config.model, resolution=size, num_classes=config.num_classes, **{**arguments, **kwargs})
    full = sizes_of(units_of(model))
    units = {name: (block.heads, block.neurons) for name, block in config.blocks.items()}
    smaller = {name: size for name, size in units.items() if full.get(name) != size}
    try:
        model = shaped(model, smaller, None if config.tokens is None else config.tokens.model_dump())
        model.load_state_dict(load_file(str(path)), strict=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error
    return model.float().eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
