"""Pydantic's errors in words: one line a key, all of them at once, unions as one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .deepspeed_keys import KNOWN_KEYS, BatchSizes, batch_sizes, check_deepspeed
from .describe import (
    describe,
    field_type,
    found,
    is_model,
    item_type,
    kind_of,
    kinds_of,
    union_members,
    unwrap,
    without_null,
)
from .issues import Issue, close_hint, report

__all__ = ["BatchSizes", "Issue", "batch_sizes", "check_deepspeed", "explain", "report"]

KeyPath = tuple[str | int, ...]

_SAID_BY_ALLOWED = {
    "literal_error",
    "enum",
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "too_short",
    "too_long",
    "int_from_float",
    "model_attributes_type",
}
"""Pydantic error types whose message is fully said by what is allowed; so are all that end in `_type`."""


@dataclass(frozen=True)
class _Place:
    """Where an error stands: path in the file, the type of that value, and the model that holds the key.

    With `at_union` the walk stopped at a union, because pydantic goes on with a label for each branch.
    """

    path: KeyPath
    type: Any
    owner: Any
    at_union: bool = False


def explain(error: ValidationError, tp: Any, raw: Any, prefix: str) -> list[Issue]:
    """One issue for each wrong key.

    Args:
        error: what pydantic raised when `raw` was validated against `tp`.
        tp: the model or type.
        raw: the value as it stands in the file.
        prefix: dotted path of `raw` in the file, e.g. ``"efftrain.methods.svite"``.
    """
    issues: dict[Issue, None] = {}  # an ordered set: the branches of a union lead to the same line
    for item in error.errors(include_url=False):
        place = _locate(tp, item["loc"])
        if place.at_union:
            value = _value_at(raw, place.path)
            issues.update(dict.fromkeys(_explain_union(place.type, value, _join(prefix, place.path))))
        else:
            issues[_explain_item(item, place, raw, prefix)] = None
    return list(issues)


def _join(prefix: str, path: KeyPath) -> str:
    text = prefix
    for element in path:
        text += f"[{element}]" if isinstance(element, int) else f".{element}" if text else element
    return text


def _value_at(raw: Any, path: KeyPath) -> Any:
    for element in path:
        raw = raw[element]
    return raw


def find_field(model: type[BaseModel], key: str | int) -> FieldInfo | None:
    """The field that is written `key` in the file (its alias where it has one)."""
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            return field
    return None


def _locate(tp: Any, loc: Sequence[str | int]) -> _Place:
    """Follow pydantic's location through the type; see `_Place`."""
    path: list[str | int] = []
    owner: Any = None
    for element in loc:
        current = without_null(tp)
        base, _ = unwrap(current)
        if union_members(current):
            return _Place(tuple(path), tp, owner, at_union=True)
        if element == "[key]":  # a wrong key of a dictionary: the path already names it
            continue
        if is_model(base):
            owner = base
            field = find_field(base, element)
            tp = field_type(field) if field is not None else Any
        elif isinstance(element, int):
            owner, tp = base, item_type(base, element)
        else:
            owner, tp = base, (getattr(base, "__args__", (Any, Any)) + (Any, Any))[1]
        path.append(element)
    return _Place(tuple(path), tp, owner)


def _explain_item(item: Any, place: _Place, raw: Any, prefix: str) -> Issue:
    key, kind = _join(prefix, place.path), item["type"]
    if kind == "extra_forbidden":
        return Issue(key, _unknown_key(str(place.path[-1]), place.owner))
    if kind == "missing":
        if isinstance(place.path[-1], int):  # a tuple that is too short: name the whole list
            parent = place.path[:-1]
            return Issue(
                _join(prefix, parent), f"{found(_value_at(raw, parent), list)}, allowed: {describe(place.owner)}"
            )
        return Issue(key, f"missing, allowed: {describe(place.type)}")
    if kind in ("value_error", "assertion_error"):
        return Issue(key, str(item["ctx"]["error"]))
    value = _value_at(raw, place.path)
    if kind in _SAID_BY_ALLOWED or kind.endswith("_type"):
        return Issue(key, f"{found(value, place.type)}, allowed: {describe(place.type)}")
    return Issue(key, f"{found(value, place.type)}: {item['msg']}")


def _unknown_key(key: str, owner: Any) -> str:
    fields = {field.alias or name: field for name, field in owner.model_fields.items()}
    if key in KNOWN_KEYS:
        return "unknown key. It is DeepSpeed's: write it at the top level of the file"
    for name, field in fields.items():
        base, _ = unwrap(without_null(field_type(field)))
        if is_model(base) and find_field(base, key) is not None:
            return f'unknown key. Did you mean "{name}.{key}"?'
    return "unknown key." + (close_hint(key, fields) or f" Allowed: {', '.join(fields) or 'none'}")


def _explain_union(tp: Any, value: Any, key: str) -> list[Issue]:
    """What is wrong with a value that fits no branch.

    An object or list is explained by the branch it comes nearest to (its keys are what the user wants to know about);
    for every other value one line says all that is allowed.
    """
    fitting = [member for member in union_members(without_null(tp)) if kind_of(value) in kinds_of(member)]
    tries = sorted((_try(member, value, key) for member in fitting), key=len)
    if tries and (len(tries) == 1 or len(tries[0]) < len(tries[1])):
        nearest = tries[0]
        inside = any(issue.key != key for issue in nearest)
        own_words = len(tries) == 1 and any(not issue.text.startswith("found ") for issue in nearest)  # of a validator
        if inside or own_words:
            return nearest
    return [Issue(key, f"{found(value, tp)}, allowed: {describe(tp)}")]


def _try(member: Any, value: Any, key: str) -> list[Issue]:
    base, _ = unwrap(member)
    adapter = TypeAdapter(member, config=None if is_model(base) else ConfigDict(strict=True))
    try:
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        return explain(error, member, value, key)
    return []
