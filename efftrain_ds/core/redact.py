"""Texts that are shown or handed on, without the secrets that URLs may carry."""

from __future__ import annotations

import re
from typing import Any, TypeVar

_URL = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s"'@]*@)?(?P<path>[^\s"'?#]*)(?P<query>[?#][^\s"']*)?"""
)
_PIPE = re.compile(r"""pipe:[^"\n]*""")
T = TypeVar("T")


def redacted(value: T) -> T:
    """`value` with every URL in it cut to scheme, host and path, and every ``pipe:`` command left out.

    User names, passwords and queries (signatures, tokens) are secrets; logs, reports and model cards are handed on.

    Args:
        value: text, or dictionaries, lists and tuples that hold text.
    """
    found: Any = value
    if isinstance(value, str):
        found = _URL.sub(lambda match: match["scheme"] + match["path"], _PIPE.sub("pipe:...", value))
    elif isinstance(value, dict):
        found = {key: redacted(inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        found = type(value)(redacted(inner) for inner in value)
    return found
