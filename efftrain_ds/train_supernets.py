"""What is done with the supernet of a configuration beside training it: its space, its weights, its latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.reader import Checkpoint
from .config.loader import LoadedConfig
from .core.errors import CheckpointError, ConfigError
from .data.manifest import Manifest
from .data.remote import open_data
from .methods.elasticvit.latency import LatencyTable
from .methods.elasticvit.latency_space import measure_table, trust_text
from .models.adapters import create_model
from .models.elastic import Space
from .models.elastic.named import space_of
from .observe.console import Console
from .planning import with_labels


def opened(config: LoadedConfig, where: str, *, held_out: bool = False, whole: bool = False) -> Manifest:
    """Shards with the run's labels; `whole` leaves nothing out for an evaluation."""
    data = config.efftrain.data
    remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "allow_pipe": data.allow_pipe}
    data = data.model_copy(update={"hold_out": None}) if whole else data
    return with_labels(open_data(where, **remote), data, held_out=held_out)


def space_of_run(config: LoadedConfig, train: Manifest) -> tuple[Space[Any], int]:
    """(space of the configured supernet, number of classes).

    Raises:
        ConfigError: the model is no supernet.
    """
    model = config.efftrain.model
    num_classes = model.num_classes or len(train.classes)
    space = space_of(model.name, model.kwargs, num_classes)
    if space is None:
        raise ConfigError(f"efftrain.model.name: {model.name} is no supernet")
    return space, num_classes


def _fresh(config: LoadedConfig, num_classes: int) -> nn.Module:
    model = config.efftrain.model
    return create_model(model.name, resolution=config.efftrain.data.resolution, num_classes=num_classes, **model.kwargs)


def load_supernet(config: LoadedConfig, found: Checkpoint, num_classes: int, *, average: bool) -> nn.Module:
    """The supernet of a configuration with the weights of a checkpoint, frozen, in evaluation mode, on the host.

    Args:
        config: the loaded file.
        found: the checkpoint.
        num_classes: of the run.
        average: take the average of the weights.

    Raises:
        CheckpointError: its parameters are others, or it has no average.
    """
    net = _fresh(config, num_classes)
    own = {name: list(parameter.shape) for name, parameter in net.named_parameters()}
    stored = found.shapes | found.frozen
    wrong = sorted(name for name in {*own, *stored} if own.get(name) != stored.get(name))
    if wrong:
        raise CheckpointError(
            f"{found.folder}: {wrong[0]} is {stored.get(wrong[0])}, {config.efftrain.model.name} of this "
            f"configuration has {own.get(wrong[0])}"
        )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(found.parameter(name, average=average))
    return net.requires_grad_(False).eval()


def measure_latency(config: LoadedConfig, file: str | Path) -> LatencyTable:
    """Measure all blocks of the configured supernet's space on this machine, compare their sums with whole networks,
    print how that went, and write the table, which ``search.latency_from`` can name. Needs no checkpoint.

    Args:
        config: the loaded file.
        file: of the table; one that is there is gone on with.

    Raises:
        EffTrainError: the model is no supernet, a package is missing, or the table there is another one.
    """
    console = Console(0)
    space, num_classes = space_of_run(config, opened(config, config.efftrain.data.train))
    net = _fresh(config, num_classes).eval()
    table = measure_table(space, net, Path(file), tell=lambda text: console.write(f"latency  {text}"))
    console.write(f"latency  {trust_text(table)}, scale {table.scale:.3f}\nwritten  {file}")
    return table
