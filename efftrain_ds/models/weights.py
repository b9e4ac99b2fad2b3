"""Weights that a run starts from: another run's checkpoint, a safetensors file, or timm's; and the head made from them.

The trunk must fit name by name; position embeddings and the like are resampled to another image size by the model's own
filter (timm's ``checkpoint_filter_fn``). The head is taken as it is, put together by class from a head of other
classes, or left new. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from .mae_weights import is_masked_autoencoder

logger = logging.getLogger(__name__)

KEY = "efftrain.model.init"
TIMM = "timm:"


@dataclass(frozen=True)
class Loaded:
    """What the weights of a run came from.

    Attributes:
        source: what was read.
        digest: first 16 hex digits of a hash of all tensors that were taken.
        tensors: tensors taken as they are.
        resampled: names of the tensors that were fitted to another image size.
        head: "same", "map" or "new".
        rows: rows of the head that were taken from the weights.
        new_rows: rows of the head that start anew.
    """

    source: str
    digest: str
    tensors: int
    resampled: tuple[str, ...]
    head: str
    rows: int
    new_rows: int

    def text(self) -> str:
        """One line for the screen."""
        head = f"head {self.head}: {self.rows:,} rows taken, {self.new_rows:,} new"
        fitted = f", {len(self.resampled)} resampled to this image size" if self.resampled else ""
        return f"{self.source}: {self.tensors} tensors{fitted}; {head}"


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Raises:
        ModelError: no such file, or it is of another form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(
            f'{KEY}.weights: {path}: no such file; allowed: a safetensors file, a checkpoint of a run, or "{TIMM}NAME"'
        )
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{KEY}.weights: {path}: not a safetensors file ({error})") from error


def read_timm(name: str) -> dict[str, Tensor]:
    """Pretrained weights of timm with their own head, by name (``NAME.TAG``).

    Raises:
        ModelError: timm has no such model or no weights of it, or they cannot be fetched.
    """
    import timm

    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # a registry, a hub or a network says no in many ways
        raise ModelError(f'{KEY}.weights: "{TIMM}{name}": {error}') from error


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that make the scores of the classes (two in a distilled DeiT, none without classes).

    Raises:
        ModelError: the model does not say.
    """
    if getattr(model, "num_classes", None) == 0:
        return ()
    config = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("classifier") if isinstance(config, Mapping) else getattr(config, "classifier", None)
    found = (named,) if isinstance(named, str) else tuple(named or ())
    modules = dict(model.named_modules())
    if not found and hasattr(model, "get_classifier"):
        wanted = model.get_classifier()
        found = tuple(name for name, module in modules.items() if module is wanted)
    found = tuple(name for name in found if isinstance(modules.get(name), (nn.Linear, nn.Conv2d)))
    if not found:
        raise ModelError(f"{KEY}.head: {type(model).__name__} does not say which of its modules is the classifier")
    return found


@torch.no_grad()
def start_from(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    head: str = "same",
    rows: Sequence[int] | None = None,
    head_scale: float = 1.0,
) -> Loaded:
    """Write weights into a model that was just made.

    Args:
        model: on the host, before DeepSpeed has it; its head keeps what it was initialised with where rows are new.
        weights: tensors by name, of the same architecture; the image size and the number of classes may differ.
        source: what they are, for messages.
        head: "same" (the head of the weights), "map" (rows of it) or "new".
        rows: with "map": row of the weights' head for every class of the model, -1 = new.
        head_scale: factor on weights and biases of a "new" head.

    Raises:
        ModelError: a parameter has no values or others' shape, or the head does not fit.
    """
    own = model.state_dict()
    names = classifier_names(model)
    of_head = {key for key in own if any(key.startswith(f"{name}.") for name in names)}
    taken = {key: value for key, value in weights.items() if key not in of_head}
    taken, resampled = _fitted(model, own, taken, names)
    wanted = set(own) - of_head
    needed = {name for name, _ in model.named_parameters()} - of_head
    missing, extra = sorted(needed - set(taken)), sorted(set(taken) - wanted)
    wrong = sorted(key for key in wanted & set(taken) if taken[key].shape != own[key].shape)
    if missing or wrong:
        what = f"no values of {_few(missing)}" if missing else ""
        shapes = [f"{key} is {list(taken[key].shape)}, the model has {list(own[key].shape)}" for key in wrong[:3]]
        raise ModelError(f"{KEY}.weights: {source} does not fit: " + "; ".join([*([what] if what else []), *shapes]))
    if extra:
        logger.warning("%s: %d tensors are not of this model and are left out: %s", source, len(extra), _few(extra))
    heads = {key: _head(key, own[key], weights.get(key), head, rows, head_scale, source) for key in sorted(of_head)}
    values = {key: taken[key] for key in sorted(wanted & set(taken))}
    for key, value in {**values, **heads}.items():
        own[key].copy_(value)
    classes = next((own[key].shape[0] for key in sorted(of_head)), 0)
    kept = {"same": classes, "new": 0}.get(head, sum(row >= 0 for row in rows or ()))
    return Loaded(source, _digest(values), len(values), tuple(resampled), head, kept, classes - kept)


def _head(
    key: str, own: Tensor, given: Tensor | None, how: str, rows: Sequence[int] | None, scale: float, source: str
) -> Tensor:
    if how == "new":
        return own * scale
    if given is None:
        raise ModelError(f'{KEY}.head: {source} has no {key}; "new" starts with a new head')
    if how == "same":
        if given.shape != own.shape:
            raise ModelError(
                f"{KEY}.head: {key} of {source} is {list(given.shape)}, the model has {list(own.shape)}; "
                'for other classes use "map" or "new"'
            )
        return given
    assert rows is not None
    if given.shape[1:] != own.shape[1:] or len(rows) != own.shape[0] or max(rows) >= given.shape[0]:
        raise ModelError(
            f"{KEY}.head: {key} of {source} is {list(given.shape)}, the map asks for rows up to {max(rows)} "
            f"and makes {len(rows)} of them, the model has {list(own.shape)}"
        )
    index = torch.as_tensor(rows, dtype=torch.long)
    present = (index >= 0).view(-1, *[1] * (own.dim() - 1))
    return torch.where(present, given[index.clamp(min=0)].to(own.dtype), own)


def _fitted(
    model: nn.Module, own: Mapping[str, Tensor], taken: dict[str, Tensor], names: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights at the model's image size, and what was changed for it."""
    if all(key in own and value.shape == own[key].shape for key, value in taken.items()):
        return taken, []
    if is_masked_autoencoder(own):  # timm's filter takes it for a DINOv2 and drops its mask token
        return taken, []
    filter_fn: Callable[..., Any] | None = None
    for cls in type(model).__mro__:  # a model may be wrapped in a class of ours
        filter_fn = getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)
        if filter_fn is not None:
            break
    if filter_fn is None:
        return taken, []
    try:
        fitted = dict(filter_fn(dict(taken), model))
    except Exception as error:  # timm's filters assume the architecture
        logger.warning("timm's filter cannot fit the weights (%s); they are taken as they are", error)
        return taken, []
    fitted = {key: value for key, value in fitted.items() if not any(key.startswith(f"{name}.") for name in names)}
    changed = [k for k in sorted(fitted) if k in taken and k in own and taken[k].shape != fitted[k].shape]
    return fitted, changed


def _digest(values: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for key, value in values.items():
        hasher.update(f"{key}{list(value.shape)}".encode())
        hasher.update(value.detach().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
