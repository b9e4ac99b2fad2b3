"""Blueprints: a module tree without weights, from which a fresh one can be made at any time.

A blueprint is a deep copy whose parameters lie on the meta device and whose buffers are real. It is taken before
DeepSpeed touches the module, so a module made from it carries none of the hooks and attributes that DeepSpeed leaves
on modules (re-used modules keep calling the first engine's functions).
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def make_blueprint(model: nn.Module) -> nn.Module:
    """Copy a module without its weights; parameters that are tied stay tied.

    Raises:
        ModelError: the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # the user may have built the model under zero.Init
        stand_in = torch.empty(shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
    return _copied(model, memo)


def copy_blueprint(blueprint: nn.Module) -> nn.Module:
    """A second blueprint that can be changed by itself."""
    return make_blueprint(blueprint)


def materialise(
    blueprint: nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """A module with uninitialised weights.

    Args:
        blueprint: from `make_blueprint`.
        dtype: of the floating-point parameters; None keeps the blueprint's. Less precise ones need less memory.
        device: of parameters and buffers.
    """
    memo: dict[int, Any] = {}
    for parameter in blueprint.parameters():
        kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        values = torch.empty(parameter.shape, dtype=kind, device=device)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    module = _copied(blueprint, memo)
    for owner in module.modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
    return module


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    # deepcopy memoises by id and needs the originals alive, which they are: the model holds them
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied, which a change of parameters in mid-run needs: {error}"
        ) from error


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def digest(module: nn.Module) -> str:
    """Identity of an architecture: names, shapes and trainability of all parameters, names and shapes of buffers."""
    rows = [f"{n} {tuple(_shape(p))} {p.requires_grad}" for n, p in module.named_parameters()]
    rows += [f"buffer {n} {tuple(b.shape)}" for n, b in module.named_buffers()]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


Hooks = list[tuple[str, str, int, Any, tuple[str, ...]]]
"""(module name, kind, key, hook, flags)."""


def hooks_of(module: nn.Module) -> Hooks:
    """Hooks on a module tree that are not DeepSpeed's, without a reference to the tree itself."""
    found: Hooks = []
    for name, owner in module.named_modules():
        for kind in _HOOKS:
            for key, hook in getattr(owner, kind).items():
                if not (getattr(hook, "__module__", "") or "").startswith("deepspeed"):
                    flags = (f"{kind}_with_kwargs", f"{kind}_always_called")
                    found.append((name, kind, key, hook, tuple(f for f in flags if key in getattr(owner, f, ()))))
    return found


def put_hooks(hooks: Hooks, module: nn.Module) -> int:
    """Put hooks that the user registered during the run on the modules of the same names in a new tree.

    Hooks that the blueprint had are there already. Returns the number of hooks put. A handle kept from the
    registration does not remove the hook from the new module.
    """
    targets = dict(module.named_modules())
    carried = 0
    for name, kind, key, hook, flags in hooks:
        if name not in targets or key in getattr(targets[name], kind):
            continue
        getattr(targets[name], kind)[key] = hook
        for flag in flags:
            getattr(targets[name], flag)[key] = True
        carried += 1
    return carried
