from __future__ import annotations

from typing import Any

import pytest

from efftrain_ds.config.jsonfile import parse_json
from efftrain_ds.config.overrides import apply_overrides, parse_override
from efftrain_ds.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("a=1", ["a"], 1),
        ("a.b.c=0.5", ["a", "b", "c"], 0.5),
        ("a=et", ["a"], "et"),
        ('a="3"', ["a"], "3"),
        ("a=5%", ["a"], "5%"),
        ("a=true", ["a"], True),
        ("a=True", ["a"], "True"),
        ("a=null", ["a"], None),
        ("a=", ["a"], ""),
        ("a=b=c", ["a"], "b=c"),
        ("a=[0.2, 1]", ["a"], [0.2, 1]),
        ('a={"b": {"c": 1}}', ["a"], {"b": {"c": 1}}),
        ("a=NaN", ["a"], "NaN"),
        ("a= 3", ["a"], 3),
        ("a={b", ["a"], "{b"),
    ],
)
def test_parse(text: str, keys: list[str], value: Any) -> None:
    parsed_keys, parsed = parse_override(text)
    assert parsed_keys == keys
    assert parsed == value
    assert type(parsed) is type(value)


def test_apply_makes_objects_and_keeps_the_source() -> None:
    source = {"train_batch_size": 4, "efftrain": {"run": {"seed": 1, "epochs": 2}}}
    overrides = ["efftrain.run.seed=5", "efftrain.methods.m.k=[1]", "train_batch_size=8", "efftrain.run.seed=6"]
    assert apply_overrides(source, overrides) == {
        "train_batch_size": 8,
        "efftrain": {"run": {"seed": 6, "epochs": 2}, "methods": {"m": {"k": [1]}}},
    }
    assert source == {"train_batch_size": 4, "efftrain": {"run": {"seed": 1, "epochs": 2}}}


def test_null_sets_null() -> None:
    assert apply_overrides({"a": {"b": 1}}, ["a.b=null"]) == {"a": {"b": None}}


def test_objects_are_replaced_whole() -> None:
    assert apply_overrides({"a": {"b": 1, "c": 2}}, ['a={"b": 3}']) == {"a": {"b": 3}}


def test_all_errors_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(
            {"a": 3, "b": {"c": [1]}, "n": None}, ["a.x=1", "noequals", ".a=1", "b.c.0=2", "n.x=1", 'a={"k":1,"k":2}']
        )
    hint = 'write path=value, e.g. "efftrain.run.epochs=100" or "train_batch_size=256"'
    assert str(caught.value).splitlines() == [
        "--set a.x=1: a is 3, not an object, so it has no key 'x'",
        f"--set noequals: {hint}",
        f"--set .a=1: {hint}",
        "--set b.c.0=2: b.c is [1], not an object, so it has no key '0'",
        "--set n.x=1: n is null, not an object, so it has no key 'x'",
        '--set a={"k":1,"k":2}: k is given more than once',
    ]


def test_parse_json_reports_duplicates_once_by_path() -> None:
    value, duplicates = parse_json('{"a": {"b": 1, "b": 2, "b": 3}, "c": [{"d": 1}, {"d": 1, "d": 2}], "a.b": 1}')
    assert value == {"a": {"b": 3}, "c": [{"d": 1}, {"d": 2}], "a.b": 1}
    assert duplicates == ["a.b", "c[1].d"]
    assert parse_json("[1, {}]") == ([1, {}], [])
