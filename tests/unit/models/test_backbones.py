"""Families of backbones under a curriculum of image sizes: what works trains whole, what cannot says so."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from efftrain_ds.core.errors import ModelError
from efftrain_ds.methods.efficienttrain.config import EfficientTrainConfig
from efftrain_ds.methods.efficienttrain.method import EfficientTrain
from efftrain_ds.models.adapters import accepts_sizes, model_stride
from tests.unit.models.tiny_backbones import FAMILIES, STRIDES, tiny

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_at_every_size_moves_every_parameter(family):
    torch.manual_seed(0)
    model = tiny(family, 96).train()
    assert accepts_sizes(model)[0]
    assert model_stride(model) == STRIDES.get(family, 32)
    assert EfficientTrain(EfficientTrainConfig()).prepare_model(model) is model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-30)
    ids = {id(p) for p in model.parameters()}
    for side in (64, 96, 64):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):  # a scale that starts at 0 lets a gradient through from the second step on
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, side, side)), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            optimizer.step()
        assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in model.parameters()} == ids == held


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("swinv2_tiny_window8_256", "strict_img_size"),
        ("swinv2_cr_tiny_224", "strict_img_size"),
        ("beit_base_patch16_224", "no adapter"),
        ("maxvit_tiny_tf_224", "no adapter"),
        ("volo_d1_224", "accept_sizes"),
        ("swin_tiny_patch4_window7_224", "accept_sizes"),
        ("eva02_tiny_patch14_224", "dynamic_img_size"),
        ("deit_tiny_patch16_224", "dynamic_img_size"),
    ],
)
def test_models_of_one_size_are_refused_with_what_to_do(name, word):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match="efftrain.methods.efficienttrain needs a model that takes several") as found:
        EfficientTrain(EfficientTrainConfig()).prepare_model(model)
    assert type(model).__name__ in str(found.value)
    assert word in str(found.value)


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("make_model_table", ROOT / "tools" / "make_model_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its own names
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))  # as for a script
        spec.loader.exec_module(module)
    return module


PAGE = ROOT / "docs" / "models.md"


def test_a_few_rows_of_the_table_are_fresh(table):
    lines = PAGE.read_text().splitlines()
    for row in table.ROWS:
        if row.name in ("resnet18", "deit_tiny_patch16_224", "pvt_v2_b0"):
            assert table.line(row) in lines


@pytest.mark.slow
def test_the_whole_table_is_fresh(table):
    assert table.main(["--check"]) == 0


def test_the_check_sees_a_stale_page(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table.render, "__defaults__", (table.ROWS[:1],))
    page = tmp_path / "models.md"
    assert table.main(["--check", "--out", str(page)]) == 1
    assert "is stale: run python tools/make_model_table.py" in capsys.readouterr().err
    assert table.main(["--out", str(page)]) == 0
    assert table.main(["--check", "--out", str(page)]) == 0
    assert page.read_text().isascii()
    assert max(len(x) for x in page.read_text().splitlines() if not x.startswith(("|", "- "))) <= 120


def test_counts_are_the_published_ones_or_the_table_says_why_not(table):
    found = {}
    for text in PAGE.read_text().splitlines():
        if text.startswith("| `"):
            cells = [cell.strip() for cell in text.strip("|").split("|")]
            if not cells[1].isdigit():
                continue
            found[cells[0].strip("`"), int(cells[1])] = (int(cells[2].replace(",", "")), float(cells[4].split()[0]))
    assert set(found) == {(row.name, row.side) for row in table.ROWS}
    for row in table.ROWS:
        params, macs = found[row.name, row.side]
        differs = table.off(row.params, params / 1e6) or table.off(row.macs, macs)
        assert differs == bool(row.note), row
        assert row.note in ("", *table.NOTES)
        assert row.source in table.SOURCES
        for published, count in ((row.params, params / 1e6), (row.macs, macs)):
            limit = 0.06 if row.note == "cswin" else 0.05 if float(published or 9) > 5 else 0.15  # DeiT-T: "5M" of 5.7
            assert not published or abs(float(published) - count) < limit * count, row


def test_every_configuration_of_imagenet_is_in_the_table(table):
    names = {
        json.loads(p.read_text())["efftrain"]["model"]["name"] for p in (ROOT / "ds_configs").glob("et*_in1k.json")
    }
    assert len(names) >= 9
    assert names <= {row.name for row in table.ROWS}
