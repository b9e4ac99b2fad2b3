"""Methods by name. A package outside this one registers its own with `register_method`."""

from __future__ import annotations

import difflib
import importlib

from .errors import ConfigError
from .method import PHASES, Method

_METHODS: dict[str, type[Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Make a method known under ``cls.name``; usable as a class decorator.

    Raises:
        ValueError: the name is empty or taken by another class, or the phase is unknown.
    """
    if not cls.name:
        raise ValueError(f"{cls.__qualname__} needs a class attribute `name`")
    if cls.phase not in PHASES:
        raise ValueError(f"{cls.__qualname__}.phase is {cls.phase!r}, allowed: {', '.join(PHASES)}")
    known = _METHODS.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the method name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}")
    _METHODS[cls.name] = cls
    return cls


def unregister_method(name: str) -> None:
    """Forget a method (for tests)."""
    _METHODS.pop(name, None)


def method_names() -> list[str]:
    """Registered names, sorted."""
    return sorted(_METHODS)


def get_method(name: str) -> type[Method]:
    """The class registered as `name`.

    Raises:
        ConfigError: no such method.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigError(f"efftrain.methods.{name}: unknown method.{hint} Registered: {', '.join(method_names())}")
    return _METHODS[name]


def import_plugins(modules: list[str]) -> None:
    """Import the modules that register methods from outside the package.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f'efftrain.plugins: cannot import "{module}": {error}') from error
