"""Timm classification models: creation, stride, which input sizes they take, and parameter groups.

timm is imported where it is used: a plan of a plain ViT needs none of it, and importing it takes seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError
from . import swin, volo

# Modules of timm.models by what their constructors take (checked with timm 1.0.31 by building one model of each).
_DYNAMIC = frozenset({"deit", "eva", "vision_transformer", "vision_transformer_hybrid", "vitamin"})
_IMG_SIZE = _DYNAMIC | {
    *("beit", "cait", "coat", "convit", "crossvit", "efficientformer", "efficientformer_v2", "gcvit", "hiera"),
    *("levit", "maxxvit", "mlp_mixer", "nest", "pit", "sequencer", "swin_transformer", "swin_transformer_v2"),
    *("swin_transformer_v2_cr", "tnt", "twins", "visformer", "vision_transformer_relpos", "vision_transformer_sam"),
    *("volo", "xcit", "mae"),
}
# Modules whose models refuse, or fail at, another size than the one they were built for.
_FIXED = frozenset(
    {
        *("beit", "cait", "coat", "convit", "efficientformer", "efficientformer_v2", "gcvit", "hiera", "levit"),
        *("maxxvit", "mlp_mixer", "nest", "pit", "tnt", "visformer", "vision_transformer_relpos", "volo"),
    }
)
_SWIN = frozenset({"swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"})
# Modules whose constructors drop paths where they are not told otherwise.
_DROPS = _SWIN | {"fasternet", "focalnet", "nest", "nextvit", "tiny_vit"}
_TORCHVISION_FIXED = frozenset({"vision_transformer", "maxvit"})
_ADAPTED = {"volo": volo.accept_sizes, "swin_transformer": swin.accept_sizes}
"""What makes the models of a module of timm.models take several sizes where no argument of theirs does."""


def create_model(
    name: str,
    *,
    resolution: int,
    num_classes: int,
    drop_path: float = 0.0,
    dynamic: bool = False,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm classification model.

    Args:
        name: for `timm.create_model` (a tag such as ``.in1k`` or a ``hf-hub:`` address may be part of it).
        resolution: side of the images in pixels at full cost; becomes ``img_size`` where the model has one.
        num_classes: outputs of the classifier.
        drop_path: stochastic depth rate of the last block.
        dynamic: make a plain ViT (DeiT, EVA, ...) accept any multiple of its patch, VOLO any multiple of 16, and Swin
            any multiple of 32: position embeddings and bias tables keep the size of `resolution` and are resampled in
            each forward, so no parameter changes with the input size. Swin's windows scale with the image; with
            ``strict_img_size=False`` they keep their size and smaller maps are padded, which timm does by itself.
        pretrained: load timm's weights.
        **kwargs: further arguments of `timm.create_model`; they win over the ones derived here.

    Raises:
        ModelError: unknown name, or arguments that the model does not take.
    """
    family = _family(name)
    derived: dict[str, Any] = {"num_classes": num_classes}
    if drop_path or family in _DROPS:
        derived["drop_path_rate"] = drop_path
    if family in _IMG_SIZE:
        derived["img_size"] = resolution
    if dynamic and family in _DYNAMIC:
        derived["dynamic_img_size"] = True
    model = _build(name, {**derived, **kwargs, "pretrained": pretrained})
    return accept_sizes(model) if dynamic and family in _ADAPTED else model


def accept_sizes(model: nn.Module) -> nn.Module:
    """Adapt a built VOLO or Swin to several image sizes, in place; any other model is returned as it is.

    `create_model` does this with ``dynamic=True``. Call it on a model of your own before `efftrain_ds.initialize`.
    """
    adapt = _ADAPTED.get(_origin(model)[1])
    return model if adapt is None or getattr(model, "dynamic_img_size", False) is True else adapt(model)


def model_stride(model_or_name: nn.Module | str, kwargs: Mapping[str, Any] | None = None) -> int:
    """Total stride in pixels: the patch of a ViT, 32 of most hierarchical models. Sides must be multiples of it.

    A name is built on the meta device: no weight is allocated, drawn or loaded (about 0.2 s). A module that timm did
    not make states its stride in an integer attribute ``total_stride``.

    Args:
        model_or_name: a module, or a name for `timm.create_model`.
        kwargs: with a name, the arguments of `timm.create_model` (a patch size changes the stride).

    Raises:
        ModelError: unknown name, arguments that the model does not take, or a module that does not say.
    """
    model = model_or_name
    if isinstance(model, str):
        with torch.device("meta"):
            model = _build(model, {**(kwargs or {}), "pretrained": False})
    declared = getattr(model, "total_stride", None)
    if isinstance(declared, int):
        return declared
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    if isinstance(rows, list) and rows:
        return int(max(row["reduction"] for row in rows))
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        return int(max(patch)) if isinstance(patch, (tuple, list)) else int(patch)
    raise ModelError(
        f"cannot tell the stride of {type(model).__name__}: set efftrain.data.stride, or give the "
        "module an integer attribute `total_stride` (input sides must be multiples of it)"
    )


def accepts_sizes(model: nn.Module) -> tuple[bool, str]:
    """Whether the model takes images of several sizes without a change of its parameters, and why (not).

    A ViT does when it was built with ``dynamic_img_size=True``, VOLO and Swin after `accept_sizes`, convolutional and
    pooling models and our CSWin do always. A module of unknown origin is trusted.
    """
    for module in model.modules():
        if not hasattr(module, "forward_features") and _origin(module)[0] != "torchvision":
            continue  # a block, not a backbone
        reason = _refusal(module)
        if reason:
            return False, reason
    return True, f"{type(model).__name__} takes any multiple of its stride"


def no_weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups "decay" and "no_decay" of the trainable parameters; empty groups are left out.

    No decay for one-dimensional parameters, biases and the names in ``model.no_weight_decay()`` (position embedding,
    class token). Each group has "name", "params" and "weight_decay".
    """
    from timm.optim import param_groups_weight_decay

    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=skip)
    named = [{"name": "decay" if group["weight_decay"] else "no_decay", **group} for group in groups]
    return sorted(named, key=lambda group: group["name"])


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """`timm.create_model` with errors that name the key.

    Raises:
        ModelError: unknown name, or arguments that the model does not take.
    """
    timm = _timm()
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ModelError(f'efftrain.model.name: timm has no model "{name}".{hint}')
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"efftrain.model: timm cannot build {name} with {arguments}: {error}") from error


def _timm() -> Any:
    """timm, with the models of this package in its registry."""
    import timm

    from . import cswin, mae  # noqa: F401  (registers them)
    from .elastic import supernets  # noqa: F401

    return timm


def _family(name: str) -> str:
    """Module of timm.models, or of ours, that builds `name` ("" for names that are not in timm's registry)."""
    timm = _timm()
    if ":" in name or not timm.is_model(name):
        return ""
    return timm.model_entrypoint(name.split(".")[0]).__module__.rsplit(".", 1)[-1]


def _origin(module: nn.Module) -> tuple[str, str]:
    """("timm" or "torchvision", module file) of the first library class among the bases, else ("", "")."""
    for cls in type(module).__mro__:
        package, _, rest = cls.__module__.partition(".models.")
        if package in ("timm", "torchvision") and rest:
            return package, rest.rsplit(".", 1)[-1]
    return "", ""


def _refusal(module: nn.Module) -> str:
    """Why this backbone takes one size only; "" if it takes several."""
    name, (package, family) = type(module).__name__, _origin(module)
    dynamic = getattr(module, "dynamic_img_size", None)
    strict = getattr(getattr(module, "patch_embed", None), "strict_img_size", None)
    if package == "torchvision":
        return f"torchvision's {name} takes one image size; use a timm model" if family in _TORCHVISION_FIXED else ""
    if family in _SWIN and (strict or dynamic is False):
        adapter = (
            "create it with create_model(..., dynamic=True), or call efftrain_ds.models.adapters.accept_sizes(model): "
            "the windows then scale with the image; "
            if family in _ADAPTED
            else "its position biases are computed for one size of window and there is no adapter for it; "
        )
        return (
            f"{name} was built for one image size and its windows with it; {adapter}efftrain.model.kwargs "
            '{"strict_img_size": false} keeps the windows and pads smaller maps (costs extra attention)'
        )
    if dynamic is False:
        return f"{name} was built for one image size; build it with dynamic_img_size=True (efftrain.model.kwargs)"
    if family == "volo" and not dynamic:
        return (
            f"{name} was built for one image size; create it with create_model(..., dynamic=True), or call "
            "efftrain_ds.models.adapters.accept_sizes(model)"
        )
    if (family in _FIXED or strict) and not dynamic:
        return f"{name} takes only the image size it was built for, and there is no adapter for it yet"
    return ""
