"""What describes a space comes from a JSON file or from code: each entry has to be of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ...core.errors import ModelError

_NEEDED = {
    "integer": "a positive integer",
    "integer or none": "a positive integer or null",
    "integers": "a list of positive integers",
    "numbers": "a list of positive numbers",
    "flag": "true or false",
    "text": "a text",
}


def check_fields(values: Mapping[str, Any], rules: Mapping[str, str], where: str = "") -> None:
    """Check the entries that describe a space, wherever they come from.

    Args:
        values: entries by key; those without a rule are not looked at.
        rules: "integer", "integer or none", "integers", "numbers", "flag" or "text", by key.
        where: in front of the key in errors.

    Raises:
        ModelError: names the first entry that is something else, what was found and what is needed.
    """
    for key, rule in rules.items():
        if key in values and not _fits(values[key], rule):
            name = f"{where}.{key}" if where else key
            raise ModelError(f"{name} is {json.dumps(values[key], default=str)}; {_NEEDED[rule]} is needed")


def _fits(value: Any, rule: str) -> bool:
    if rule == "flag":
        return isinstance(value, bool)
    if rule == "text":
        return isinstance(value, str)
    if rule == "integer or none" and value is None:
        return True
    many = rule in ("integers", "numbers")
    if many and not isinstance(value, (list, tuple)):
        return False
    kinds = (int, float) if rule == "numbers" else (int,)
    return all(
        isinstance(one, kinds) and not isinstance(one, bool) and math.isfinite(one) and one > 0
        for one in (value if many else (value,))
    )
