"""The launch table: shipped rows, the default, and the user's own rows."""

from __future__ import annotations

import json

import pytest
import torch

from efftrain_ds.kernels import runtime
from efftrain_ds.kernels.attention import Launch, lookup, table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(table.VARIABLE, raising=False)
    table.clear_cache()
    yield
    table.clear_cache()


def test_every_key_has_an_entry_whose_kernels_take_its_length():
    found = list(table.keys())
    assert len(found) == len(runtime.ARCHITECTURES) * 4 * 4 * 4 * 2 == len(set(found))
    for key in found:
        entry = table.resolve(key, table.shipped_rows())
        for launch in (entry.forward, entry.backward):
            assert launch.kernel == "list" or key.length != "list"
            assert launch.num_warps in (1, 2, 4, 8, 16)
            assert launch.precision == "ieee"
        assert 0 <= entry.min_sparsity <= 1


def test_unknown_gpu_finds_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (13, 7))
    table.architecture.cache_clear()
    try:
        assert table.architecture("cuda", 5) == "default"
    finally:
        table.architecture.cache_clear()
    for dtype in table.DTYPES:
        for dim in table.HEAD_DIMS:
            assert lookup(CPU, dtype, dim, 100, 3000).origin == "shipped"


def test_architectures_of_compute_capabilities():
    classes = {
        "sm_80": [(8, 0), (8, 7)],
        "sm_89": [(8, 6), (8, 9), (12, 0), (12, 1)],
        "sm_90": [(9, 0)],
        "sm_100": [(10, 0), (10, 3)],
        "default": [(11, 0), (13, 0)],
    }
    assert set(classes) == set(runtime.ARCHITECTURES)
    for name, members in classes.items():
        assert [runtime.architecture(member) for member in members] == [name] * len(members)


def test_blackwell_for_workstations_is_treated_as_ada(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (12, 0))
    monkeypatch.setattr(table, "_device_name", lambda *_: "GPU")
    table.architecture.cache_clear()
    try:
        found = lookup(torch.device("cuda", 3), torch.bfloat16, 64, 577, 577, sparse=True)
    finally:
        table.architecture.cache_clear()
    assert found == table.resolve(table.Key("sm_89", "bf16", 64, "list", True), table.shipped_rows())


def test_long_sequences_prefer_sdpa_without_a_mask_only():
    assert lookup(CPU, torch.bfloat16, 64, 577, 577).prefer == "sdpa"
    masked = lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True)
    assert masked.prefer == "kernel"
    assert masked.min_sparsity == 0.3


def test_a_row_for_another_block():
    assert lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True, block=128).forward.num_warps == 8
    assert lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True, block=64).forward.num_warps == 4


def test_buckets():
    assert [table.bucket(n, 1) for n in (1, 64, 65, 128, 129, 256, 257)] == [
        "64",
        "64",
        "128",
        "128",
        "256",
        "256",
        "list",
    ]
    assert table.bucket(10, 300) == "list"


def test_unsupported_sizes_are_named():
    with pytest.raises(ValueError, match="head dim 72"):
        lookup(CPU, torch.bfloat16, 72, 10, 10)
    with pytest.raises(ValueError, match="int8"):
        lookup(CPU, torch.int8, 64, 10, 10)


def row(**changes):
    return {"head_dim": 64, "forward": Launch("list", num_warps=2), "backward": Launch("list"), **changes}


def test_user_rows_override_and_are_keyed_by_gpu_triton_and_source(monkeypatch):
    before = lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True)
    file = table.save_user_rows("cpu", [row(min_sparsity=0.5)])
    assert file == table.user_path()
    after = lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True)
    assert (after.forward.num_warps, after.min_sparsity, after.origin) == (2, 0.5, str(file))
    assert lookup(CPU, torch.bfloat16, 32, 577, 577, sparse=True).origin == "shipped", "another head dim"
    table.save_user_rows("another GPU", [row(min_sparsity=0.9)])
    assert lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True) == after, "rows of two GPUs live in one file"
    monkeypatch.setattr(table, "source_hash", lambda: "changed")
    table.clear_cache()
    assert lookup(CPU, torch.bfloat16, 64, 577, 577, sparse=True) == before, "other kernels, other rows"


def test_named_file_is_used_and_must_be_right(tmp_path, monkeypatch):
    file = tmp_path / "shared.json"
    monkeypatch.setenv(table.VARIABLE, str(file))
    with pytest.raises(ValueError, match=r"EFFTRAIN_KERNEL_TABLE=.*shared.json cannot be read"):
        lookup(CPU, torch.bfloat16, 64, 10, 10)
    table.save_user_rows("cpu", [row(prefer="sdpa")])
    assert lookup(CPU, torch.bfloat16, 64, 10, 10).prefer == "sdpa"


def test_damaged_file_in_the_cache_folder_is_ignored(caplog):
    table.user_path().parent.mkdir(parents=True)
    table.user_path().write_text("{not json", "utf-8")
    assert lookup(CPU, torch.bfloat16, 64, 10, 10).origin == "shipped"
    assert "ignoring the kernel table" in caplog.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"forward": {"kernel": "fast"}}, "forward has a kernel of"),
        ({"forward": {"kernel": "list", "warps": 4}}, "forward has a kernel of"),
        ({"forward": {"kernel": "resident"}}, "up to 256 tokens"),
        ({"forward": {"kernel": "resident"}, "length": ["256", "list"]}, "up to 256 tokens"),
        ({"prefer": "torch"}, 'prefer is "kernel" or "sdpa"'),
        ({"heads": 3}, "may have"),
    ],
)
def test_wrong_rows_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        table.save_user_rows("cpu", [row(**changes)])


def test_file_is_json_that_people_can_read():
    file = table.save_user_rows("cpu", [row()])
    tables = json.loads(file.read_text("utf-8"))
    (key,) = tables
    assert key.startswith("cpu | triton ")
    assert tables[key][0]["forward"]["kernel"] == "list"
