"""Extracted sub-networks in one file: safetensors, with the space and the configuration in its header.

Such a file needs neither the supernet nor its checkpoint, and nothing in it is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError, ModelError
from .hybrid_space import read_hybrid
from .plain_space import read_plain
from .space import Space, SubnetConfig

_KEY = "efftrain_subnet"
_READERS = {"elasticvit": read_hybrid, "plain_vit": read_plain}


def read_space(data: Any, where: str = "space") -> Space[Any]:
    """A space from its JSON form (`Space.to_dict`).

    Args:
        data: the object.
        where: what errors call it.

    Raises:
        ConfigError: names the entry that is unknown, missing or wrong.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {json.dumps(data, default=str)}; an object is needed")
    kind = data.get("space")
    if not isinstance(kind, str) or kind not in _READERS:
        raise ConfigError(f"{where}.space is {json.dumps(kind)}; allowed: {', '.join(_READERS)}")
    return _READERS[kind](data, where)


def save_extracted(path: Path | str, net: nn.Module, space: Space[Any], config: SubnetConfig) -> None:
    """Write a network that `Space.extract` gave.

    Raises:
        ModelError: the space does not have this sub-network, or the network has other parameters than it.
    """
    from safetensors.torch import save_file

    space.check(config)
    found = sum(parameter.numel() for parameter in net.parameters())
    if found != space.params(config):
        raise ModelError(f"{type(net).__name__} has {found:,} parameters; the sub-network has {space.params(config):,}")
    header = {"space": space.to_dict(), "config": config.to_dict(), "options": space.options(net)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    save_file(tensors, str(path), metadata={_KEY: json.dumps(header)})


def load_extracted(path: Path | str) -> tuple[nn.Module, Space[Any], Any]:
    """A sub-network from a file of `save_extracted`.

    Returns:
        (network in evaluation mode, space, configuration).

    Raises:
        ModelError: another kind of file, or tensors that are not this sub-network's.
        ConfigError: its space or configuration is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if header is None:
        raise ModelError(f"{path} holds no sub-network; such a file is written by save_extracted")
    data = json.loads(header)
    space = read_space(data["space"], f"{path}: space")
    config = space.parse(data["config"], f"{path}: config")
    with torch.device("meta"):
        net = space.extract(space.supernet(**data["options"]), config)
    try:
        net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: {error}") from error
    return net.eval(), space, config
