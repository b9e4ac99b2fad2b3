"""Layer-wise learning-rate decay: the head trains at the full rate, each layer below it at a fixed share of the next.

Introduced with ELECTRA (Clark et al., ICLR 2020) and used for fine-tuning vision transformers since BEiT (Bao et al.,
ICLR 2022). Layers are those of the model's own `group_matcher` (timm's models have one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import ModelError

SCALE = "lr_scale"
"""Key of a parameter group: its share of the learning rate."""


def layer_numbers(model: nn.Module, groups: int | None = None) -> dict[str, int]:
    """Layer of every parameter: 0 is the stem, the highest number the head.

    Args:
        model: a timm model, or one whose classifier is named by ``pretrained_cfg["classifier"]``.
        groups: merge the layers between stem and head into so many of equal length; None keeps one a block.

    Raises:
        ModelError: the layers of the model are not known, or there are fewer than `groups`.
    """
    from timm.models import group_parameters
    from timm.optim import auto_group_layers

    if hasattr(model, "group_matcher"):
        found: Mapping[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    else:
        found = auto_group_layers(model)
    numbers = {name: int(number) for name, number in found.items()}
    last = max(numbers.values(), default=0)
    if last == 0 or any(name not in numbers for name, _ in model.named_parameters()):
        raise ModelError(
            f"efftrain.optim.layer_decay: the layers of {type(model).__name__} are not known; give it a "
            "group_matcher() as timm's models have"
        )
    if groups is None:
        return numbers
    inner = last - 1
    if groups > inner:
        raise ModelError(
            f"efftrain.optim.layer_decay.groups: {groups}, but {type(model).__name__} has {inner} layers between stem "
            "and head"
        )
    merged = {0: 0, last: groups + 1}
    merged |= {layer: 1 + (layer - 1) * groups // inner for layer in range(1, last)}
    return {name: merged[number] for name, number in numbers.items()}


def layer_decay_groups(
    model: nn.Module, weight_decay: float, *, lr: float, decay: float, groups: int | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters, the head's first.

    The rate of layer i of n is ``lr * decay ** (n - i)``, n being the head. Weight decay as in
    `adapters.no_weight_decay_groups`: none for one-dimensional parameters, biases and the model's own exceptions.

    Args:
        model: see `layer_numbers`.
        weight_decay: of the others.
        lr: peak rate of the head.
        decay: share of the next layer's rate, in (0, 1].
        groups: see `layer_numbers`.

    Returns:
        Dictionaries with "name", "params", "weight_decay", "lr" and `SCALE`.

    Raises:
        ModelError: the layers of the model are not known.
    """
    from .adapters import no_weight_decay_groups

    numbers = layer_numbers(model, groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    last = max(numbers.values())
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for part in no_weight_decay_groups(model, weight_decay):
        for parameter in part["params"]:
            layer = numbers[names[id(parameter)]]
            scale = decay ** (last - layer)
            group = found.setdefault(
                (last - layer, part["name"]),
                {
                    "name": f"layer{layer}_{part['name']}",
                    "params": [],
                    "weight_decay": part["weight_decay"],
                    "lr": lr * scale,
                    SCALE: scale,
                },
            )
            group["params"].append(parameter)
    return [found[key] for key in sorted(found)]
