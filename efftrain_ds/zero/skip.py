"""Let one optimizer step be skipped by DeepSpeed's own overflow path, whatever the gradients hold.

Weights, masters and optimizer state are not touched, gradients are dropped, ``engine.was_step_applied()`` is False,
`skipped_steps` counts and the LR scheduler does not move: all of it is what DeepSpeed does after an overflow. Beside
`access` and `native_files` the only file that uses private names of DeepSpeed; `private_names` lists them and a test
names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .access import _BF16, _FUSED, _UNFUSED, _ZERO3, _ZERO12, _class_name

# wrapper class -> what this file sets or calls (checked on 0.19.8)
_PRIVATE: dict[str, tuple[str, ...]] = {
    _ZERO12: ("check_grad_overflow", "check_overflow", "overflow"),
    _ZERO3: (
        "_overflow_check_and_loss_scale_update",
        "_loss_scale_update_and_overflow_cleanup",
        "grad_partitions_flat_buffer",
        "fp32_partitioned_groups_flat",
        "overflow",
    ),
    _BF16: ("clear_hp_grads", "clear_lp_grads", "_global_grad_norm", "overflow"),
    _UNFUSED: ("_skip_invalid_grad_norm", "overflow"),
    _FUSED: ("_skip_invalid_grad_norm", "overflow"),
}


def private_names() -> dict[str, tuple[str, ...]]:
    """Private attributes in use, by DeepSpeed class."""
    return dict(_PRIVATE)


@contextmanager
def _override(thing: Any, **values: Any) -> Iterator[None]:
    """Attributes of one object for a while; what stood in its dictionary before stands there again."""
    own = thing.__dict__
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)


@contextmanager
def skipped_step(engine: Any) -> Iterator[None]:
    """The ``engine.step()`` inside is skipped. To be used on all ranks or on none."""
    optimizer = engine.optimizer
    name = _class_name(optimizer)
    if name == _ZERO12:

        def overflow(partition_gradients: bool = True) -> None:
            optimizer.overflow = True

        with _override(optimizer, check_grad_overflow=True, check_overflow=overflow):
            yield
    elif name == _ZERO3:

        def check(update_scale: bool = True) -> bool:
            optimizer.overflow = True
            return optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else True

        with _override(optimizer, _overflow_check_and_loss_scale_update=check):
            yield
        _clear_partitions(optimizer)
    elif name == _BF16:

        def drop(closure: Any = None) -> None:
            optimizer.overflow = True
            optimizer._global_grad_norm = float("inf")
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()

        with _override(optimizer, step=drop):
            yield
    elif name in (_UNFUSED, _FUSED):
        with _override(optimizer, step=lambda closure=None: optimizer._skip_invalid_grad_norm()):
            yield
    else:  # a plain optimizer has no overflow path; the engine reads `overflow` where there is such an attribute
        with _override(optimizer, step=lambda closure=None: None, overflow=True):
            yield


def forget_gradients(engine: Any) -> None:
    """Set what ZeRO-3 keeps of a step's gradients to zero, after ``engine.step()``; the other stages keep nothing.

    Its first backward pass of a step overwrites gradients, those after it add to them. A parameter that takes part in a
    later pass only would get the gradient of the step before once more.
    """
    if _class_name(engine.optimizer) == _ZERO3:
        _clear_partitions(engine.optimizer)


def _clear_partitions(optimizer: Any) -> None:
    """ZeRO-3 would apply the last gradient of a parameter again that takes no part in the next step."""
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if isinstance(flat, Tensor):
        flat.zero_()
    for master in optimizer.fp32_partitioned_groups_flat:
        if master.grad is not None:
            master.grad.zero_()


def scales_loss(engine: Any) -> bool:
    """True where a loss scaler searches its scale, so that an overflow of the gradients is no fault."""
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    if any(scaler is not None for scaler in scalers):
        return True
    return bool(engine.fp16_enabled()) and bool(engine.dynamic_loss_scale())


def loss_scale(engine: Any) -> float:
    """Factor that the engine puts on the loss in the backward pass, beside one over the accumulation count.

    Read it between the last backward pass of a step and ``engine.step()``, which may change it.
    """
    engine = getattr(engine, "deepspeed_engine", engine)
    optimizer = engine.optimizer
    if getattr(optimizer, "custom_loss_scaler", False):
        return float(optimizer.external_loss_scale)
    for owner, name in ((optimizer, "torch_autocast_gradscaler"), (engine, "torch_autocast_z0_gradscaler")):
        scaler = getattr(owner, name, None)
        if scaler is not None:
            return float(scaler.get_scale())
    # an optimizer that has only a `loss_scale_config` (stage 0) does not scale the loss
    return float(getattr(getattr(optimizer, "loss_scaler", None), "cur_scale", 1.0))


def scale_is_exhausted(engine: Any) -> bool:
    """True where the loss scale stands at its minimum, so that a skipped step is no search any more."""
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    scale, least = getattr(scaler, "cur_scale", None), getattr(scaler, "min_scale", None)
    return scale is not None and least is not None and scale <= least


def unchecked_gradients(engine: Any) -> list[Tensor]:
    """Reduced gradients that DeepSpeed would apply without looking at them (plain optimizer); [] in other cases."""
    if _class_name(engine.optimizer) in _PRIVATE:
        return []
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


@torch.no_grad()
def sum_is_finite(tensors: list[Tensor]) -> Tensor:
    """0-dim bool on the tensors' device; one pass over them."""
    dense = [t._values() if t.is_sparse else t for t in tensors]
    if dense[0].device.type == "cpu":  # where there is nothing to launch, a sum takes half the time of a norm
        each = [torch.sum(t, dim=None, dtype=torch.float32) for t in dense]
    else:
        each = [n.float() for n in torch._foreach_norm(dense, 1)]
    return torch.isfinite(torch.stack(each).sum(dtype=torch.float64))
