"""Texts that are shown or handed on, without the secrets that URLs and commands may carry."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

PIPE = "pipe:"
HIDDEN = "pipe:..."
"""What is shown of a ``pipe:`` command; a text that has it is not changed again."""

# A quote ' may belong to the URL, but for one that ends the word; a " may not.
_URL = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s"?#]*@)?(?P<path>[^\s"?#]*)"""
    r"""([?#](?:(?!'[]),}:;.]*(?:\s|$))[^\s"])*)?"""
)
_JSON_PIPE = re.compile(r"""(?<=")pipe:(?!\.\.\.)(?:\\.|[^"\\])*""")
_PIPE = re.compile(r"""(?<![A-Za-z])pipe:(?!\.\.\.)[^\n]*""")
_WHOLE = re.compile(r"""(?P<key>[\w./-]+=["']?)?pipe:(?!\.\.\.)""")
_HEADER = re.compile(r"""(?i)(?P<name>\bauthorization["']?\s*[:=]\s*["']?)(?:[A-Za-z]+\s+)?[^\s"',]+""")
_BEARER = re.compile(r"""(?i)(?P<name>\bbearer\s+)[\w.~+/=-]{8,}""")
T = TypeVar("T")


def redacted(value: T) -> T:
    """`value` with every URL in it cut to scheme, host and path, and every ``pipe:`` command left out.

    User names, passwords and queries (signatures, tokens) are secrets; logs, reports and model cards are handed on.

    Args:
        value: text, or dictionaries, lists and tuples that hold text.
    """
    found: Any = value
    if isinstance(value, str):
        found = _text(value)
    elif isinstance(value, dict):
        found = {key: redacted(inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        found = type(value)(redacted(inner) for inner in value)
    return found


def _text(text: str) -> str:
    if whole := _WHOLE.match(text):  # one value: all of it is the command, however many lines it has
        return (whole["key"] or "") + HIDDEN
    if PIPE in text:  # nobody knows where a command ends within a text: in JSON with its string, else with the line
        if _is_json(text):
            text = _JSON_PIPE.sub(HIDDEN, text)
        text = _PIPE.sub(HIDDEN, text)
    if "://" in text:
        text = _URL.sub(lambda match: match["scheme"] + match["path"], text)
    for pattern in (_HEADER, _BEARER):
        text = pattern.sub(lambda match: match["name"] + "...", text)
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
