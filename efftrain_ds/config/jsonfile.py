"""Strict reading of JSON: line and column of a mistake, no duplicate keys, no NaN."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError


class _Pairs(list):
    """Members of one JSON object in file order, before duplicates are merged."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Read JSON text.

    Returns:
        The value, and the dotted path of every key that stands more than once in its object (the last one is kept).

    Raises:
        ValueError: the text is not JSON (`json.JSONDecodeError` where the place is known), or holds NaN or Infinity.
    """
    duplicates: list[str] = []

    def merge(value: Any, path: str) -> Any:
        if isinstance(value, _Pairs):
            merged: dict[str, Any] = {}
            for key, member in value:
                where = f"{path}.{key}" if path else key
                if key in merged and where not in duplicates:
                    duplicates.append(where)
                merged[key] = merge(member, where)
            return merged
        if isinstance(value, list):
            return [merge(member, f"{path}[{i}]") for i, member in enumerate(value)]
        return value

    return merge(json.loads(text, object_pairs_hook=_Pairs, parse_constant=_refuse_constant), ""), duplicates


def read_json(path: Path) -> tuple[Any, list[str]]:
    """Read a JSON file; see `parse_json`.

    Raises:
        ConfigError: the file cannot be read, or is not JSON; the text names the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"efftrain config: no such file: {path}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"efftrain config: cannot read {path}: {error}") from error
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        shown = lines[error.lineno - 1].replace("\t", " ") if error.lineno <= len(lines) else ""
        raise ConfigError(
            f"efftrain config: {path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}\n"
            f"  {shown[:120]}\n  {' ' * min(error.colno - 1, 120)}^"
        ) from None
    except ValueError as error:
        raise ConfigError(f"efftrain config: {path} is not JSON: {error}") from None


def _similar_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {path.parent / close[0]}?" if close else ""
