from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from efftrain_ds.config.describe import describe, found, kind_of, kinds_of, show, union_members, without_null
from efftrain_ds.config.sections import DurationText, EmaConfig, Fraction
from efftrain_ds.core.strict import StrictModel


class WindowStage(StrictModel):
    """A stage."""


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (str, "a string"),
        (bool, "true or false"),
        (Any, "any value"),
        (None | int, "a whole number or null"),
        (Fraction, "a number from 0 to 1"),
        (Annotated[float, Field(ge=0, lt=1)], "a number >= 0 and < 1"),
        (Annotated[int, Field(gt=0)], "a whole number > 0"),
        (Annotated[int | None, Field(gt=0)], "a whole number > 0 or null"),
        (Literal["a"], '"a"'),
        (Literal["a", "b"], '"a" or "b"'),
        (Literal["a", "b", 3], '"a", "b", or 3'),
        (Literal["a", "b"] | list[WindowStage], '"a", "b", or a list of window stages'),
        (list[EmaConfig], "a list of emas"),
        (list[int], "a list of whole numbers"),
        (list[Fraction], "a list of numbers from 0 to 1"),
        (list[str], "a list of strings"),
        (list[tuple[int, int]], "a list of lists of 2 whole numbers"),
        (list[Literal["a", "b"]], 'a list of values, each "a" or "b"'),
        (Annotated[list[int], Field(min_length=2)], "a list of at least 2 whole numbers"),
        (Annotated[list[int], Field(min_length=2, max_length=4)], "a list of 2 to 4 whole numbers"),
        (tuple[float, float], "a list of 2 numbers"),
        (tuple[float, ...], "a list of numbers"),
        (tuple[int, str], "a list [a whole number, a string]"),
        (list, "a list"),
        (dict[str, Any], "an object"),
        (dict[str, float], "an object of numbers"),
        (EmaConfig, "an object"),
        (EmaConfig | None, "an object or null"),
        (DurationText, 'a duration ("500st", "2ep", "10%", "30min")'),
        (DurationText | None, 'a duration ("500st", "2ep", "10%", "30min") or null'),
        (Color, '"red" or "blue"'),
    ],
)
def test_describe(tp: Any, words: str) -> None:
    assert describe(tp) == words


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "null"), (True, "boolean"), (1, "integer"), (1.0, "number"), ("", "string"), ([], "array"), ({}, "object")],
)
def test_kind_of(value: Any, kind: str) -> None:
    assert kind_of(value) == kind


def test_kinds_of() -> None:
    assert kinds_of(float) == {"integer", "number"}
    assert kinds_of(bool) == {"boolean"}
    assert kinds_of(Literal["a", 1] | list[int] | None) == {"string", "integer", "array", "null"}
    assert kinds_of(dict[str, int]) == kinds_of(EmaConfig) == {"object"}
    assert kinds_of(tuple[int, ...]) == {"array"}


def test_found_names_the_kind_only_where_it_is_wrong() -> None:
    assert found("3", int) == 'found "3" (a string)'
    assert found(3, int) == "found 3"
    assert found(3, float) == "found 3"
    assert found(True, int) == "found true"
    assert found(None, int) == "found null"


def test_show_is_cut() -> None:
    assert show({"a": [1, 2]}) == '{"a": [1, 2]}'
    assert len(show("x" * 500)) == 60
    assert show("x" * 500).endswith(" ...")


def test_unions() -> None:
    assert union_members(int | str) == [int, str]
    assert union_members(int | None) == []
    assert without_null(int | None) is int
    assert describe(without_null(Annotated[int | None, Field(gt=0)])) == "a whole number > 0"
