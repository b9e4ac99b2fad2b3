"""Types in words: what a key allows, for error texts and for the generated documentation."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import GroupedMetadata
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .sections import DurationText, StepText

_DURATION_MARK = get_args(DurationText)[1]
_STEP_MARK = get_args(StepText)[1]
_KIND_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "array": "a list",
    "object": "an object",
}
_ALL_KINDS = frozenset({"null", "boolean", *_KIND_WORDS})
_OPERATORS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def field_type(field: FieldInfo) -> Any:
    """The annotation of a model's field together with its constraints."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def unwrap(tp: Any) -> tuple[Any, list[Any]]:
    """Take ``Annotated`` and type aliases off; returns the bare type and the flat list of metadata."""
    metadata: list[Any] = []
    while True:
        if get_origin(tp) is Annotated:
            tp, *extra = get_args(tp)
            metadata += _flatten(extra)
        elif hasattr(tp, "__value__"):  # a `type X = ...` alias
            tp = tp.__value__
        else:
            return tp, metadata


def _flatten(metadata: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            flat += _flatten(item.metadata)
        elif isinstance(item, GroupedMetadata):
            flat += list(item)
        else:
            flat.append(item)
    return flat


def union_members(tp: Any) -> list[Any]:
    """Members of a union other than null; empty when `tp` is not a union of at least two of them."""
    base, _ = unwrap(tp)
    if get_origin(base) not in (Union, types.UnionType):
        return []
    members = [member for member in get_args(base) if member is not type(None)]
    return members if len(members) > 1 else []


def without_null(tp: Any) -> Any:
    """``X`` for ``X | None`` (constraints kept); every other type as it is."""
    base, metadata = unwrap(tp)
    if get_origin(base) in (Union, types.UnionType):
        members = [member for member in get_args(base) if member is not type(None)]
        if len(members) == 1:
            return Annotated[(members[0], *metadata)] if metadata else members[0]
    return tp


def is_model(tp: Any) -> bool:
    """True for a pydantic model class."""
    return isinstance(tp, type) and issubclass(tp, BaseModel)


def item_type(tp: Any, index: int) -> Any:
    """Type of one element of a list or tuple type."""
    args = get_args(tp)
    if get_origin(tp) is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return args[index] if index < len(args) else Any
    return args[0] if args else Any


def kind_of(value: Any) -> str:
    """JSON kind of a value: null, boolean, integer, number, string, array or object."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"


def kinds_of(tp: Any) -> frozenset[str]:
    """JSON kinds that a type takes."""
    base, _ = unwrap(tp)
    origin = get_origin(base) or base
    if origin in (Union, types.UnionType):
        return frozenset().union(*(kinds_of(member) for member in get_args(base)))
    if origin is Literal:
        return frozenset(kind_of(value) for value in get_args(base))
    if base is type(None):
        return frozenset({"null"})
    if not isinstance(origin, type):
        return _ALL_KINDS
    if issubclass(origin, Enum):
        return frozenset(kind_of(member.value) for member in origin)
    for python_type, kinds in (
        (bool, {"boolean"}),
        (int, {"integer"}),
        (float, {"integer", "number"}),
        (str, {"string"}),
        ((BaseModel, Mapping), {"object"}),
        ((Sequence, AbstractSet), {"array"}),
    ):
        if issubclass(origin, python_type):
            return frozenset(kinds)
    return _ALL_KINDS


def show(value: Any, limit: int = 60) -> str:
    """A value as JSON, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def found(value: Any, tp: Any) -> str:
    """``found "3" (a string)``: the value, and its kind where the type takes no value of that kind."""
    kind = kind_of(value)
    words = f" ({_KIND_WORDS[kind]})" if kind in _KIND_WORDS and kind not in kinds_of(tp) else ""
    return f"found {show(value)}{words}"


def join_or(parts: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b, or c``."""
    if len(parts) < 3:
        return " or ".join(parts)
    return ", ".join(parts[:-1]) + ", or " + parts[-1]


def describe(tp: Any) -> str:
    """What a type allows, in words, e.g. ``"et", "et++", or a list of stages``."""
    return join_or(_parts(tp, []))


def _parts(tp: Any, outer: list[Any]) -> list[str]:
    base, metadata = unwrap(tp)
    metadata = metadata + outer
    origin = get_origin(base) or base
    if origin in (Union, types.UnionType):
        members = sorted(get_args(base), key=lambda member: member is type(None))
        parts = [part for member in members for part in _parts(member, metadata)]
        return list(dict.fromkeys(parts))
    if origin is Literal:
        return [show(value) for value in get_args(base)]
    if base is type(None):
        return ["null"]
    if base is bool:
        return ["true", "false"]
    if isinstance(origin, type) and issubclass(origin, Enum):
        return [show(member.value) for member in origin]
    if base is str and _STEP_MARK in metadata:
        return ['a duration in steps ("500st", "2ep", "10%")']
    if base is str and _DURATION_MARK in metadata:
        return ['a duration ("500st", "2ep", "10%", "30min")']
    kinds = kinds_of(base)
    if kinds == {"array"}:
        return [_list_words(base, origin, metadata)]
    if kinds == {"object"}:
        value = get_args(base)[1] if origin is dict and len(get_args(base)) == 2 else Any
        return ["an object" if value is Any else f"an object of {_plural(value)}"]
    if kinds == _ALL_KINDS:
        return ["any value"]
    return [_KIND_WORDS["number" if "number" in kinds else next(iter(kinds))] + _range(metadata)]


def _list_words(base: Any, origin: Any, metadata: list[Any]) -> str:
    args = get_args(base)
    if not args:
        return "a list"
    if origin is tuple and Ellipsis not in args:
        if len(set(args)) == 1:
            return f"a list of {len(args)} {_plural(args[0])}"
        return "a list [" + ", ".join(describe(arg) for arg in args) + "]"
    low = next((m.min_length for m in metadata if getattr(m, "min_length", None)), None)
    high = next((m.max_length for m in metadata if getattr(m, "max_length", None) is not None), None)
    count = f"{low} to {high} " if low and high else f"at least {low} " if low else f"up to {high} " if high else ""
    return f"a list of {count}{_plural(args[0])}"


def _range(metadata: list[Any]) -> str:
    bounds = [
        (sign, getattr(item, name))
        for name, sign in _OPERATORS
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    if [sign for sign, _ in bounds] == [">=", "<="]:
        return f" from {bounds[0][1]:g} to {bounds[1][1]:g}"
    return " " + " and ".join(f"{sign} {bound:g}" for sign, bound in bounds) if bounds else ""


def _plural(tp: Any) -> str:
    base, metadata = unwrap(tp)
    if is_model(base):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"(Config|Model)$", "", base.__name__)).lower()
        return words + ("" if words.endswith("s") else "s")
    parts = _parts(tp, [])
    if len(parts) == 1 and parts[0].startswith(("a ", "an ")):
        noun, _, rest = parts[0].split(" ", 1)[1].partition(" ")
        if noun == "whole":
            noun, _, rest = parts[0].removeprefix("a ").partition("number")
            noun, rest = noun + "number", rest.strip()
        return f"{noun}s {rest}".strip()
    return "values, each " + join_or(parts)
