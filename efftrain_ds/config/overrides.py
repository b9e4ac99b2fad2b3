"""``--set path=value`` on the command line: changes to the raw JSON before it is validated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import ConfigError
from .describe import show
from .jsonfile import parse_json


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``"efftrain.data.scale=[0.2, 1]"`` into its path and its value.

    The value is read as JSON and taken as a string where it is not JSON, so quotes are rarely needed.

    Raises:
        ConfigError: there is no "=", or a part of the path is empty.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f'--set {text}: write path=value, e.g. "efftrain.run.epochs=100" or "train_batch_size=256"')
    try:
        parsed, duplicates = parse_json(value)
    except ValueError:
        return keys, value
    if duplicates:
        raise ConfigError(f"--set {text}: {duplicates[0]} is given more than once")
    return keys, parsed


def apply_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A deep copy of `config` with each override applied in order; objects on the way are made where they lack.

    Raises:
        ConfigError: an override cannot be read, or its path leads through a value that is not an object (all of them
            in one text).
    """
    result = copy.deepcopy(dict(config))
    wrong: list[str] = []
    for text in overrides:
        try:
            _apply(result, text)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return result


def _apply(config: dict[str, Any], text: str) -> None:
    keys, value = parse_override(text)
    node = config
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            where = ".".join(keys[:depth])
            raise ConfigError(
                f"--set {text}: {where} is {show(child)}, not an object, so it has no key {keys[depth]!r}"
            )
        node = child
    node[keys[-1]] = value
