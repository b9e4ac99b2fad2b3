"""Block-sparse attention on packed qkv: two sets of Triton kernels, SDPA, and plain torch, behind one operation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import self_test
    from .mask import BlockMask
    from .op import attention, attention_qkv, route_for
    from .reference import attention_reference
    from .table import Entry, Launch, lookup

__all__ = [
    "BlockMask",
    "Entry",
    "Launch",
    "attention",
    "attention_qkv",
    "attention_reference",
    "lookup",
    "route_for",
    "self_test",
]

_HOMES = {
    "attention": "op",
    "attention_qkv": "op",
    "route_for": "op",
    "self_test": "check",
    "BlockMask": "mask",
    "attention_reference": "reference",
    "Entry": "table",
    "Launch": "table",
    "lookup": "table",
}


def __getattr__(name: str) -> Any:
    # lazily: planning and the tuner need the table or the masks without the operation
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
