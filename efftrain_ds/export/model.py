"""The model of a checkpoint: its architecture is read from the stored names and shapes, its weights from the shards,
one parameter at a time. No engine, no device and no method's code takes part.

It is a plain timm model, or one with fewer heads and neurons, or with a token selector, where the run trained such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..checkpoint.reader import Checkpoint
from ..config.sections import DataConfig, ModelConfig
from ..core.errors import CheckpointError, ModelError
from ..models.adapters import create_model
from ..models.mae_weights import is_masked_autoencoder
from ..models.stacks import prepare_growth, stacks_of
from ..models.unit_export import dense_twin
from ..models.units import units_of
from .compact import NOT_FROM_FILES, shaped, slots_of

_SELECTOR = "patch_drop."
"""Where a token selector stands in the model."""


@dataclass(frozen=True)
class ModelSpec:
    """What the exported model is built from.

    Attributes:
        name: for `timm.create_model`.
        kwargs: further arguments, those of a smaller depth included.
        num_classes: outputs of the classifier.
        resolution: side in pixels of the images that the run evaluates on.
        data: how an image becomes an input.
        pretrained: the run started from timm's weights.
        units: heads and neurons of the blocks that have fewer of them than timm's.
        tokens: arguments of the token selector, or None.
    """

    name: str
    kwargs: Mapping[str, Any]
    num_classes: int
    resolution: int
    data: DataConfig
    pretrained: bool
    units: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tokens: Mapping[str, Any] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether timm's model computes what the trained one does."""
        return not self.units and self.tokens is None

    def create(self, device: str = "cpu", *, plain: bool = False, **kwargs: Any) -> nn.Module:
        """The model with fresh weights.

        Args:
            device: "cpu" or "meta".
            plain: timm's model of full width without a token selector.
            **kwargs: further arguments of `timm.create_model`.

        Raises:
            ModelError: timm cannot build it.
        """
        with torch.device(device):
            model = create_model(
                self.name,
                resolution=self.resolution,
                num_classes=self.num_classes,
                **{**self.kwargs, **kwargs},
            )
            return model if plain else shaped(model, self.units, self.tokens)


def model_spec(found: Checkpoint, config: Mapping[str, Any] | None = None) -> ModelSpec:
    """What the model of a checkpoint is built from.

    Args:
        found: the checkpoint.
        config: whole configuration with an "efftrain" section; None takes the one that the checkpoint holds.

    Raises:
        CheckpointError: the checkpoint holds no configuration or names no timm model, or timm cannot build a model with
            the stored parameters.
    """
    config = found.config if config is None else config
    if config is None:
        raise CheckpointError(
            f"{found.folder}: holds no configuration (it was saved by a loop of your own); name one with "
            "efftrain.model and efftrain.data: --config FILE"
        )
    section = config.get("efftrain") or {}
    try:
        model = ModelConfig.model_validate_json(json.dumps(section.get("model") or {}))
        data = DataConfig.model_validate_json(json.dumps(section.get("data") or {}))
    except ValidationError as error:
        raise CheckpointError(f"{found.folder}: configuration: {error.errors()[0]['msg']}") from error
    if not model.name:
        raise CheckpointError(f"{found.folder}: efftrain.model.name is not given; only timm models can be exported")
    if is_masked_autoencoder(found.shapes):
        raise CheckpointError(
            f"{found.folder}: is a masked autoencoder ({model.name}) without classes; fine-tune a classifier from "
            "it with efftrain.model.init (docs/mae.md) and export that"
        )
    # built for one size, as timm's own checkpoints are: several sizes during training change no parameter
    kwargs = {key: value for key, value in model.kwargs.items() if key not in NOT_FROM_FILES}
    spec = ModelSpec(model.name, kwargs, model.num_classes or 1, data.resolution, data, model.pretrained)
    spec = replace(spec, num_classes=_classes(spec, found))
    spec = replace(spec, units=_units(spec, found))
    if not spec.units:
        spec = replace(spec, kwargs=_fitted(spec, found))
    return replace(spec, tokens=_tokens(found))


def load(spec: ModelSpec, found: Checkpoint, *, average: bool = False, **kwargs: Any) -> nn.Module:
    """The model with the weights of the checkpoint in fp32, in evaluation mode.

    Args:
        spec: of `model_spec`.
        found: the checkpoint.
        average: take the average of the weights.
        **kwargs: further arguments of `timm.create_model` that change no parameter.

    Raises:
        CheckpointError: parameters or buffers of the checkpoint are not the model's, or block masks prune attention.
    """
    model = spec.create(**kwargs).float().eval()
    _check(spec, found, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.parameter(name, average=average))
            if f"{name}_mask" in found.buffers:  # sparse training: what the forward pass computed with
                parameter.mul_(found.buffer(f"{name}_mask"))
        for name, buffer in model.named_buffers():
            if name in found.buffers:
                buffer.copy_(found.buffer(name))
    return model


def full_width(spec: ModelSpec, found: Checkpoint, model: nn.Module) -> nn.Module:
    """A plain timm model with the logits of `model`: zeros stand where it has no heads or neurons.

    Args:
        spec: of `model_spec`.
        found: the checkpoint.
        model: of `load`; it is not changed, and returned where it is plain.

    Raises:
        CheckpointError: the model selects tokens.
    """
    if spec.tokens is not None:
        raise CheckpointError(
            f"{found.folder}: the model selects tokens ({spec.tokens['select']}, {spec.tokens['keep']:g} of them), "
            "which timm's model does not; allowed: the formats compact and onnx"
        )
    if spec.is_plain:
        return model
    full = units_of(spec.create("meta", plain=True))
    return dense_twin(model, full, slots_of(found.methods, units_of(model), full))


def _shapes(found: Checkpoint) -> dict[str, list[int]]:
    """Stored parameters but those of a token selector."""
    stored = found.shapes | found.frozen
    return {name: shape for name, shape in stored.items() if not name.startswith(_SELECTOR)}


def _tokens(found: Checkpoint) -> Mapping[str, Any] | None:
    """Arguments of the token selector, which a method has stored beside the model's architecture.

    Raises:
        CheckpointError: there is a selector and no word on it.
    """
    if not any(name.startswith(_SELECTOR) for name in found.shapes | found.frozen):
        return None
    for own in ((found.architecture or {}).get("methods") or {}).values():
        if isinstance(own, dict) and {"keep", "select"} <= set(own):
            return {"keep": float(own["keep"]), "select": str(own["select"])}
    raise CheckpointError(
        f"{found.folder}: has a token selector ({_SELECTOR}*), but no method that says how many tokens it keeps"
    )


def _units(spec: ModelSpec, found: Checkpoint) -> dict[str, tuple[int, int]]:
    """Heads and neurons of the blocks that are stored smaller than timm's; empty where none are.

    Other differences are left to `_fitted`, which has the words for them.
    """
    shapes = _shapes(found)
    try:
        full = units_of(spec.create("meta", plain=True))
    except ModelError:
        return {}
    smaller: dict[str, tuple[int, int]] = {}
    for name, size in full.items():
        qkv, fc1 = (shapes.get(f"{name}.{layer}.weight", [0]) for layer in ("attn.qkv", "mlp.fc1"))
        heads, rest = divmod(qkv[0], 3 * size.head_dim)
        if rest or not (1 <= heads <= size.heads and 1 <= fc1[0] <= size.neurons):
            return {}
        if (heads, fc1[0]) != (size.heads, size.neurons):
            smaller[name] = (heads, fc1[0])
    if smaller and _difference(shapes, shaped(spec.create("meta", plain=True), smaller, None)) is not None:
        return {}
    return smaller


def _classes(spec: ModelSpec, found: Checkpoint) -> int:
    """Outputs of the classifier, by the stored weights.

    Raises:
        CheckpointError: the model does not name its classifier, or the checkpoint lacks it.
    """
    model = spec.create("meta")
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    name = f"{names if isinstance(names, str) else names[0]}.weight"
    shapes = _shapes(found)
    if name not in shapes:
        raise CheckpointError(f"{found.folder}: has no {name}, the classifier of {spec.name}")
    return shapes[name][0]


def _fitted(spec: ModelSpec, found: Checkpoint) -> Mapping[str, Any]:
    """Arguments of timm for the stored depth; those of the full model where it fits as it is.

    Raises:
        CheckpointError: timm has no model of that name with these parameters.
    """
    full = spec.create("meta")
    problem = _difference(_shapes(found), full)
    if problem is None:
        return spec.kwargs
    shallow = dict(spec.kwargs)
    try:
        stacks = stacks_of(prepare_growth(full))
        depths: dict[str, int] = {}
        for stack in stacks:
            for container, _ in stack.slots:
                head = f"{container}."
                indices = {int(n[len(head) :].split(".")[0]) for n in _shapes(found) if n.startswith(head)}
                if indices != set(range(len(indices))):
                    raise ModelError(f"{container} holds blocks {sorted(indices)}")
                depths[container] = len(indices)
        if list(depths) != ["blocks"]:
            words = ", ".join(f"{name} {depth}" for name, depth in depths.items())
            raise ModelError(f"timm takes no depth for {spec.name} ({words})")
        shallow["depth"] = depths["blocks"]
        model = replace(spec, kwargs=shallow).create("meta")
    except (ModelError, ValueError) as error:
        raise _refused(found, spec, f"{problem}; {error}") from error
    rest = _difference(_shapes(found), model)
    if rest is not None:
        raise _refused(found, spec, rest)
    return shallow


def _refused(found: Checkpoint, spec: ModelSpec, why: str) -> CheckpointError:
    return CheckpointError(
        f"{found.folder}: timm cannot build {spec.name} as it was at step {found.step:,}: {why}. A checkpoint of the "
        "last stage, where the model has its full depth, can be exported"
    )


def _check(spec: ModelSpec, found: Checkpoint, model: nn.Module) -> None:
    problem = _difference(found.shapes | found.frozen, model)
    buffers = dict(model.named_buffers())
    masks = _block_masks(found)
    wrong = [
        f"buffer {name} is {shape}, timm's is {list(buffers[name].shape) if name in buffers else None}"
        for name, shape in found.buffers.items()
        if not name.startswith(masks)
        and not _of_weight(name, found)
        and (name not in buffers or list(buffers[name].shape) != shape)
    ]
    if problem is not None or wrong:
        raise _refused(found, spec, problem or wrong[0])


def _of_weight(name: str, found: Checkpoint) -> bool:
    """True for the mask of a weight (and the wider one for its gradient), which the exported weight has in it."""
    return any(
        name.endswith(tail) and name.removesuffix(tail) in found.shapes | found.frozen
        for tail in ("_mask", "_backward")
    )


def _block_masks(found: Checkpoint) -> tuple[str, ...]:
    """Prefixes of the buffers of block masks. One that keeps every block changes nothing and is left out of the model.

    Raises:
        CheckpointError: a mask prunes blocks.
    """
    tail = ".block_mask.keep"
    names = sorted(name.removesuffix(tail) for name in found.buffers if name.endswith(tail))
    pruned = [name for name in names if not found.buffer(f"{name}{tail}").all()]
    if pruned:
        raise CheckpointError(
            f"{found.folder}: {len(pruned)} attention layers prune blocks with a mask ({', '.join(pruned[:3])}"
            f"{', ...' if pruned[3:] else ''}), which timm's attention does not have; without it the outputs are "
            "others. In your own code: timm.create_model, efftrain_ds.models.attention.use_block_attention with a "
            "BlockMask of each stored keep (checkpoint.reader.Checkpoint.buffer), weights by Checkpoint.parameter"
        )
    return tuple(f"{name}.block_mask." for name in names)


def _difference(shapes: Mapping[str, list[int]], model: nn.Module) -> str | None:
    """The first difference between stored shapes and a model; None where there is none."""
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    missing, unknown = sorted(set(own) - set(shapes)), sorted(set(shapes) - set(own))
    if missing:
        return f"the checkpoint has no {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    if unknown:
        return f"timm's model has no {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
    wrong = [name for name, shape in own.items() if shapes[name] != shape]
    return f"{wrong[0]} is {shapes[wrong[0]]}, timm's is {own[wrong[0]]}" if wrong else None
