"""Secrets of URLs stay out of what is shown."""

from __future__ import annotations

import pytest

from efftrain_ds.core.redact import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host:80/set/a.tar?X-Amz-Signature=1#f", "https://host:80/set/a.tar"),
        ("s3://bucket/train", "s3://bucket/train"),
        ('{"train": "https://u@h/x?t=1", "val": null}', '{"train": "https://h/x", "val": null}'),
        ("pipe:curl -H 'token: 1' https://h/x", "pipe:..."),
        ("--set efftrain.data.train=http://a:b@c/d", "--set efftrain.data.train=http://c/d"),
        ("bundled:fashion_mnist/train", "bundled:fashion_mnist/train"),
        ("mail a@b.c, step 3/4?", "mail a@b.c, step 3/4?"),
    ],
)
def test_texts(text, shown):
    assert redacted(text) == shown


def test_nested_values_keep_their_kind():
    value = {"a": ["https://u:p@h/x", 1, None], "b": ("s3://k:v@b/y?z",), "c": 2.5}
    assert redacted(value) == {"a": ["https://h/x", 1, None], "b": ("s3://b/y",), "c": 2.5}
    assert value["a"][0] == "https://u:p@h/x"
