"""What the trainer starts from: initial weights, the head made from them, and the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint.reader import AVERAGE, Checkpoint
from .checkpoint.survey import newest
from .config.loader import LoadedConfig
from .config.sections import InitConfig
from .core.errors import ConfigError, DesyncError
from .core.ranks import gather
from .data.labels import label_set, positions_of
from .models.adapters import no_weight_decay_groups
from .models.layer_decay import layer_decay_groups
from .models.mae_weights import encoder_weights, is_masked_autoencoder
from .models.weights import KEY, TIMM, Loaded, read_file, read_timm, start_from


def initial_weights(model: nn.Module, config: LoadedConfig, classes: Sequence[str]) -> Loaded | None:
    """Write the weights of ``efftrain.model.init`` into a model that was just made. Collective.

    Args:
        model: on the host, before DeepSpeed has it.
        config: the loaded file.
        classes: names of the classes that the model is to tell apart; may be empty.

    Returns:
        What was read, None where nothing is configured.

    Raises:
        ConfigError: an unknown label set, or classes without a row in the head of the weights.
        ModelError: the weights cannot be read or do not fit.
        CheckpointError: a checkpoint is damaged, or has no average of the weights.
        DesyncError: the ranks have read different weights.
    """
    init = config.efftrain.model.init
    if init is None:
        return None
    rows = head_rows(init, config, classes) if init.head == "map" else None
    weights, source = _read(init)
    if is_masked_autoencoder(weights):
        weights, source = encoder_weights(weights, model), f"{source} (of a masked autoencoder)"
    found = start_from(model, weights, source=source, head=init.head, rows=rows, head_scale=init.head_scale)
    digests = gather(found.digest)
    if len(set(digests)) > 1:
        other = next(i for i, digest in enumerate(digests) if digest != digests[0])
        raise DesyncError(f"{KEY}.weights: rank {other} has read other values from {source} than rank 0")
    return found


def head_rows(init: InitConfig, config: LoadedConfig, classes: Sequence[str]) -> list[int]:
    """Row of the weights' head for every class of the model, -1 = a new one.

    Raises:
        ConfigError: a label set is unknown, the model's classes are not known, are of another number or in another
            order, or classes have no row.
    """
    assert init.labels is not None  # the configuration asks for it
    source = label_set(init.labels, f"{KEY}.labels")
    labels, num_classes = config.efftrain.data.labels, config.efftrain.model.num_classes
    if init.target is not None:
        target = label_set(init.target, f"{KEY}.target")
        if classes and target.synsets != tuple(classes):
            raise ConfigError(
                f"{KEY}.target: {target.name} is not the order of the training data's classes ({', '.join(classes[:3])}"
                f"{', ...' if len(classes) > 3 else ''}); leave it out, or bring the data into its order with "
                "efftrain.data.labels"
            )
        name, classes = target.name, target.synsets
    elif labels is not None:
        name, classes = labels.target, label_set(labels.target, "efftrain.data.labels.target").synsets
    else:
        name = "the classes of the shards"
    expected = num_classes or len(classes)
    if not classes or len(classes) != expected:
        raise ConfigError(
            f"{KEY}.target: {name}: {len(classes)} classes, efftrain.model.num_classes is {expected}; name the label "
            "set of this model's classes"
        )
    rows = positions_of(classes, source).tolist()
    absent = [c for c, row in zip(classes, rows, strict=True) if row < 0]
    if len(absent) == len(classes) or (absent and init.missing == "error"):
        hint = "" if len(absent) == len(classes) else '; missing = "new" starts their rows anew'
        raise ConfigError(
            f"{KEY}.labels: {len(absent)} of {len(classes)} classes of {name} are not in {source.name} "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}){hint}"
        )
    return rows


def _read(init: InitConfig) -> tuple[dict[str, Tensor], str]:
    if init.weights.startswith(TIMM):
        return read_timm(init.weights.removeprefix(TIMM)), init.weights
    path = Path(init.weights)
    if not path.is_dir():
        return read_file(path), str(path)
    found = Checkpoint(newest(path))
    average = AVERAGE in found.keys if init.average is None else init.average
    values = {name: found.parameter(name, average=average) for name in (*found.shapes, *found.frozen)}
    masks = {name for name in values if f"{name}_mask" in found.buffers}
    values |= {name: values[name] * found.buffer(f"{name}_mask") for name in masks}  # what was computed with
    values |= {name: found.buffer(name) for name in found.buffers if not name.endswith("_mask")}
    return values, f"{found.folder}{' (average of the weights)' if average else ''}"


def parameter_groups(model: nn.Module, config: LoadedConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: with and without weight decay, by layer where the learning rate falls with depth.

    Raises:
        ConfigError: layer decay together with a scheduler of DeepSpeed's, which knows one rate only.
        ModelError: the layers of the model are not known.
    """
    params = (config.deepspeed.get("optimizer") or {}).get("params", {})
    decay, layers = params.get("weight_decay", 0.0), config.efftrain.optim.layer_decay
    if layers is None:
        return no_weight_decay_groups(model, decay)
    if "scheduler" in config.deepspeed:
        raise ConfigError(
            "efftrain.optim.layer_decay: DeepSpeed's scheduler would give all layers one rate; remove the scheduler "
            "section (efftrain.optim.schedule takes its place)"
        )
    if not isinstance(params.get("lr"), (int, float)):
        raise ConfigError("optimizer.params.lr: missing; efftrain.optim.layer_decay takes shares of it")
    return layer_decay_groups(model, decay, lr=float(params["lr"]), decay=layers.rate, groups=layers.groups)
