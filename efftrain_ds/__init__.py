"""EffTrain-DS: a DeepSpeed plugin that makes training vision backbones several times cheaper at equal accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EfficientEngine", "Method", "__version__", "initialize", "load_config", "register_method", "wrap"]

if TYPE_CHECKING:
    from .config.loader import load_config
    from .core.method import Method
    from .core.registry import register_method
    from .engine import EfficientEngine
    from .startup import initialize, wrap

_HOMES = {
    "EfficientEngine": "engine",
    "initialize": "startup",
    "wrap": "startup",
    "Method": "core.method",
    "register_method": "core.registry",
    "load_config": "config.loader",
}


def __getattr__(name: str) -> Any:
    # lazily, so that planning and the command line start without importing DeepSpeed
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
