"""The methods that come with the package. Outside packages register theirs through ``"plugins"``."""

from __future__ import annotations

import importlib
import importlib.util

BUILTIN_MODULES: tuple[str, ...] = (
    "efftrain_ds.methods.efficienttrain.method",
    "efftrain_ds.methods.autoprog.method",
    "efftrain_ds.methods.autoprog.unfreeze",
    "efftrain_ds.methods.svite.method",
    "efftrain_ds.methods.svite.s2vite",
    "efftrain_ds.methods.svite.tokens",
    "efftrain_ds.methods.svite.attention",
    "efftrain_ds.methods.elasticvit.method",
    "efftrain_ds.methods.mae.method",
)
"""Modules that register a method when they are imported; names only, so that none is loaded too early."""


def register_builtin_methods() -> None:
    """Import every module of `BUILTIN_MODULES` that is installed. Cheap when called again."""
    for name in BUILTIN_MODULES:
        package = name.rpartition(".")[0]
        if importlib.util.find_spec(package) is not None and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
