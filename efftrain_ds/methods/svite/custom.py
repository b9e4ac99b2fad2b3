"""Densities of the layers from a file of the user: distribution "custom"."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from .densities import Shapes

_SHOWN = 3


def read_densities(path: str | Path, key: str) -> dict[str, float]:
    """Read ``{"blocks.0.attn.qkv.weight": 0.5, ...}``; ".weight" may be left out.

    Args:
        path: JSON file.
        key: name of the configuration key that names the file, for errors.

    Returns:
        Density by name of the weight, with ".weight".

    Raises:
        ConfigError: the file cannot be read, is no object of numbers in (0, 1], is empty, or names a layer twice.
    """
    where = f"{key}: {path}"
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}, column {error.colno}: not JSON, {error.msg[0].lower()}{error.msg[1:]}"
        ) from error
    if not isinstance(pairs, _Pairs) or not pairs:
        raise ConfigError(
            f'{where}: allowed: an object of densities by layer, {{"blocks.0.attn.qkv.weight": 0.5, ...}}'
        )
    found: dict[str, float] = {}
    for name, value in pairs:
        full = name if name.endswith(".weight") else f"{name}.weight"
        if full in found:
            raise ConfigError(f"{where}: {full} stands there twice")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:  # False for NaN too
            shown = json.dumps(dict(value) if isinstance(value, _Pairs) else value, default=str)
            raise ConfigError(f"{where}: {name} is {shown}, allowed: a number above 0, at most 1")
        found[full] = float(value)
    return found


class _Pairs(list):
    """Members of a JSON object in their order, duplicates included."""


def custom_shares(
    given: Mapping[str, float], shapes: Shapes, where: str, *, dense: Collection[str] = ()
) -> dict[str, float]:
    """The densities of exactly the layers that take a mask.

    Args:
        given: by `read_densities`.
        shapes: of the layers that take a mask.
        where: key and file, for errors.
        dense: layers that are too small for the form and stay dense, whatever is given.

    Raises:
        ConfigError: a layer is unknown or missing.
    """
    unknown = [name for name in given if name not in shapes]
    if unknown:
        raise ConfigError(
            f"{where}: no layer that takes a mask has the name {_names(unknown)}; there are {_names(list(shapes))}"
        )
    missing = [name for name in shapes if name not in given and name not in dense]
    if missing:
        raise ConfigError(f"{where}: has no density for {_names(missing)} (1 leaves a layer dense)")
    return {name: 1.0 if name in dense else given[name] for name in shapes}


def check_counts(live: Mapping[str, int], wanted: Mapping[str, int], where: str) -> None:
    """Compare the masks of a checkpoint with the file, in live entries or blocks.

    Raises:
        ConfigError: the file has changed.
    """
    for name, count in live.items():
        if wanted[name] != count:
            raise ConfigError(
                f"{where}: {name} has {count} live entries or blocks in the checkpoint, the file asks for "
                f"{wanted[name]}; a run keeps its densities"
            )


def _names(names: list[Any]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
