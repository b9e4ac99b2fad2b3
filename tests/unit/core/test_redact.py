"""Secrets of URLs and commands stay out of what is shown."""

from __future__ import annotations

import json

import pytest

from efftrain_ds.core.redact import redacted
from tests.secret_values import VALUES, seen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host:80/set/a.tar?X-Amz-Signature=1#f", "https://host:80/set/a.tar"),
        ("s3://bucket/train", "s3://bucket/train"),
        ('{"train": "https://u@h/x?t=1", "val": null}', '{"train": "https://h/x", "val": null}'),
        ("403, url='http://h/x?sig=1'), next in 2 s", "403, url='http://h/x'), next in 2 s"),
        ("pipe:curl -H 'token: 1' https://h/x", "pipe:..."),
        ("pipe:... (a.tar): try 1 of 5 failed", "pipe:... (a.tar): try 1 of 5 failed"),
        ('{"train": "pipe:cat \\"a\\" {name}", "val": null}', '{"train": "pipe:...", "val": null}'),
        ("found pipe:cat {name}\nallowed: a folder", "found pipe:...\nallowed: a folder"),
        ("--set efftrain.data.train=http://a:b@c/d", "--set efftrain.data.train=http://c/d"),
        ("efftrain.data.train=pipe:cat\n{name}", "efftrain.data.train=pipe:..."),
        ("curl: Authorization: Basic YWJj is refused", "curl: Authorization: ... is refused"),
        ("with Bearer abcdefgh1 there", "with Bearer ... there"),
        ("bundled:fashion_mnist/train", "bundled:fashion_mnist/train"),
        ("mail a@b.c, step 3/4?", "mail a@b.c, step 3/4?"),
    ],
)
def test_texts(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize("name", VALUES)
def test_no_secret_is_seen_in_any_form(name):
    value = VALUES[name]
    document = {"efftrain": {"data": {"train": value, "val": None}}, "argv": [f"efftrain.data.train={value}", "-v"]}
    assert seen(document)
    for shown in (
        redacted(value),
        redacted(document),
        redacted(json.dumps(document, indent=1)),
        redacted(json.dumps(document)),
        redacted(f'efftrain.data.train: "{value.splitlines()[0]}" is not there, allowed: a folder'),
        redacted(f"{value.splitlines()[0]}: cannot be read"),
        redacted(repr(value)),
    ):
        assert not seen(shown), shown
    assert redacted(document)["efftrain"]["data"]["val"] is None
    assert json.loads(redacted(json.dumps(document["efftrain"]))) == redacted(document["efftrain"])


def test_nested_values_keep_their_kind():
    value = {"a": ["https://u:p@h/x", 1, None], "b": ("s3://k:v@b/y?z",), "c": 2.5}
    assert redacted(value) == {"a": ["https://h/x", 1, None], "b": ("s3://b/y",), "c": 2.5}
    assert value["a"][0] == "https://u:p@h/x"
