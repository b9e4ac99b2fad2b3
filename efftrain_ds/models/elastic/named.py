"""Configured supernets by name, without building them and without timm; `supernets` builds them.

- ``elasticvit``: ElasticViT's space, or a shrunken one (`elasticvit_space`'s arguments in ``efftrain.model.kwargs``).
- ``elastic_autoformer_tiny``, ``_small``, ``_base``: AutoFormer's plain spaces.
- ``elastic_vit``: a plain space of your own (`PlainSpace`'s fields in ``efftrain.model.kwargs``).

Each also takes ``"space"``, the JSON form of a space, instead of its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ...core.errors import ConfigError, ModelError
from .hybrid_space import HybridSpace, elasticvit_space
from .plain_space import PlainSpace, autoformer_space
from .space import Space
from .subnets import read_space

KEY = "efftrain.model.kwargs"
_AUTOFORMER = "elastic_autoformer_"
_PLAIN = tuple(field.name for field in dataclasses.fields(PlainSpace))
_HYBRID = ("divisor", *(field.name for field in dataclasses.fields(HybridSpace) if field.name != "stages"))


def is_supernet(name: str) -> bool:
    """Whether a name of a model is one of this module's."""
    return name in ("elasticvit", "elastic_vit") or name.startswith(_AUTOFORMER)


def space_of(name: str, kwargs: Mapping[str, Any], num_classes: int) -> Space[Any] | None:
    """The space of a configured supernet, without building it; None for other models.

    Args:
        name: ``efftrain.model.name``.
        kwargs: ``efftrain.model.kwargs``.
        num_classes: of the classifier; the arguments may name another number.

    Raises:
        ModelError: arguments that make no space.
    """
    return space_and_rest(name, {"num_classes": num_classes, **kwargs})[0] if is_supernet(name) else None


def space_and_rest(name: str, kwargs: Mapping[str, Any]) -> tuple[Space[Any], dict[str, Any]]:
    """The space of a supernet and the arguments that do not describe it.

    Raises:
        ModelError: arguments that make no space.
    """
    rest = {key: value for key, value in kwargs.items() if value is not None}
    fields = _HYBRID if name == "elasticvit" else _PLAIN
    given = {key: _tuple(rest.pop(key)) for key in fields if key in rest}
    whole = rest.pop("space", None)
    try:
        if whole is not None:
            clash = sorted(set(given) - {"num_classes"})
            if clash:
                raise ModelError(f'"{clash[0]}" beside "space"; give one of them')
            classes = {"num_classes": given.get("num_classes", 1000)}
            space = read_space({**whole, **classes} if isinstance(whole, Mapping) else whole, f"{KEY}.space")
        elif name == "elasticvit":
            space = elasticvit_space(**given)
        elif name == "elastic_vit":
            missing = [key for key in _PLAIN[:4] if key not in given]
            if missing:
                raise ModelError(f'"{missing[0]}" is missing; needed: {", ".join(_PLAIN[:4])}')
            space = PlainSpace(**given)
        else:
            space = autoformer_space(name.removeprefix(_AUTOFORMER), **given)
        _ = space.dimensions
    except ConfigError as error:
        raise ModelError(str(error)) from error
    except (ModelError, TypeError) as error:
        raise ModelError(f"{KEY}: {error}") from error
    return space, rest


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def unused_parts(space: Space[Any], configs: Iterable[Any]) -> tuple[str, ...]:
    """Names of the modules of a supernet that none of some sub-networks runs, e.g. ``"stages.3.layers.4"``.

    Blocks beyond the depth, and the convolutions of shortcuts between equal widths; the latter may be names of modules
    that the supernet does not have.
    """
    configs = list(configs)
    if isinstance(space, PlainSpace):
        used = {layer for config in configs for layer in config.layers}
        return tuple(f"blocks.{j}" for j in range(space.top) if j not in used)
    assert isinstance(space, HybridSpace)
    found = []
    for place, spec in enumerate(space.stages):
        depth = max(config.stages[place].depth for config in configs)
        inner = "layers" if spec.is_vit else "blocks"
        found += [f"stages.{place}.{inner}.{j}" for j in range(depth, max(spec.depths))]
        if place and all(config.stages[place - 1].width == config.stages[place].width for config in configs):
            found.append(f"stages.{place}.{'first' if spec.is_vit else 'blocks.0'}.shortcut")
    return tuple(found)
