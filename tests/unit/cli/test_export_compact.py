"""Exports of models with fewer heads and neurons and with a token selector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.cli import main as cli
from efftrain_ds.core.errors import CheckpointError, EffTrainError, ModelError
from efftrain_ds.export.compact import load_compact, read_config, trimmed
from efftrain_ds.export.images import real_inputs
from efftrain_ds.export.model import model_spec
from efftrain_ds.export.write import export_checkpoint
from efftrain_ds.models.masked import mask_layers
from efftrain_ds.models.tokens import insert_selector
from efftrain_ds.models.units import compact_, entry_mask, unit_entries, units_of
from tests.stored import save_model

DATA = {"train": "bundled:fashion_mnist/train", "resolution": 28, "mean": [0.3] * 3, "std": [0.35] * 3}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
NAME = "vit_tiny_patch16_224"
CONFIG = {"efftrain": {"model": {"name": NAME, "kwargs": VIT}, "data": DATA}}
UNEVEN = {"blocks.0": ([3, 1], list(range(100, 20, -2))), "blocks.2": ([0, 2, 1], [5, 4, 127])}
"""Heads and neurons that live; the other block is whole."""


def vit(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(4)
    made = timm.create_model(NAME, img_size=28, num_classes=10, **{**VIT, **kwargs})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def slots(model: torch.nn.Module, keep: Any) -> dict[str, Any]:
    """State of a method: the unit of the full model in every slot."""
    full = {n: (list(range(u.heads)), list(range(u.neurons))) for n, u in units_of(model).items()}
    held = {**full, **keep}
    return {n: {"heads": torch.tensor(h), "neurons": torch.tensor(m)} for n, (h, m) in held.items()}


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def small_checkpoint(folder: Path, *, tokens: dict | None = None) -> tuple[Path, torch.nn.Module]:
    model = vit()
    states = {"s2vite": {"slots": slots(model, UNEVEN), "last": 3}}
    compact_(model, UNEVEN)
    if tokens is not None:
        insert_selector(model, **tokens).eval()
        torch.nn.init.normal_(model.patch_drop.scorer.weight)
    architecture = {"s2vite": {"units": {}}} | ({"svite_tokens": tokens} if tokens else {})
    return save_model(folder, model, CONFIG, methods=states, architecture=architecture), model


def test_full_width_and_compact_files_have_equal_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = small_checkpoint(tmp_path / "c")
    images = real_inputs(model_spec(Checkpoint(folder)), 5)
    expected = logits(model, images)
    assert expected.std() > 0.1
    out = tmp_path / "out"
    assert cli.main(["export", str(folder), "--output", str(out), "--format", "hub", "compact", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["files"]) == [
        "README.md", "compact.json", "compact.safetensors", "config.json", "model.safetensors"
    ]  # fmt: skip
    assert result["notes"] == ["9 of 12 heads, 171 of 384 neurons live; timm's model has zeros at the others"]
    by_hand = timm.create_model(result["model"], **result["arguments"])
    timm.models.load_checkpoint(by_hand, str(out / "model.safetensors"))
    for loaded in (by_hand, timm.create_model(f"local-dir:{out}", pretrained=True), load_compact(out)):
        assert (logits(loaded, images) - expected).abs().max() <= 1e-5
    # zeros where the run had dead units
    weight = by_hand.blocks[2].mlp.fc1.weight
    assert weight.any(dim=1).nonzero().flatten().tolist() == [4, 5, 127]
    assert torch.equal(weight[4], model.blocks[2].mlp.fc1.weight[1])
    assert not by_hand.blocks[0].attn.proj.weight[:, :8].any()
    assert by_hand.blocks[0].attn.proj.weight[:, 8:16].any()
    small = load_compact(out)
    sizes = {name: (u.heads, u.neurons) for name, u in units_of(small).items()}
    assert sizes == {"blocks.0": (2, 40), "blocks.1": (4, 128), "blocks.2": (3, 3)}
    assert (
        sum(p.numel() for p in small.parameters()) == result["parameters"] < sum(p.numel() for p in vit().parameters())
    )
    card = (out / "README.md").read_text()
    assert "9 of 12 heads, 171 of 384 neurons; zeros" in card
    assert "load_compact" in card
    config = read_config(out)
    assert (config.input.size, config.labels[9], config.tokens) == ((3, 28, 28), "Ankle boot", None)


def test_without_slots_of_a_method_units_stand_in_order(tmp_path: Path) -> None:
    model = compact_(vit(), UNEVEN)
    for bad in (
        {},
        {"s2vite": {"slots": {"blocks.0": 1}}},
        {"x": {"slots": slots(vit(), {"blocks.0": ([0, 9], [1])})}},
    ):
        folder = save_model(tmp_path / str(len(list(tmp_path.iterdir()))), model, CONFIG, methods=bad)
        result = export_checkpoint(folder, tmp_path / f"out{folder.name}", formats=("timm",))
        assert result.checks["logits at full width"] <= 1e-5
        weights = load_file(tmp_path / f"out{folder.name}" / "model.safetensors")
        assert weights["blocks.2.mlp.fc1.weight"].any(dim=1).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("select", ["gather", "mask"])
def test_a_token_selector_is_kept(tmp_path: Path, select: str) -> None:
    folder, model = small_checkpoint(tmp_path / "c", tokens={"keep": 0.5, "select": select})
    images = real_inputs(model_spec(Checkpoint(folder)), 5)
    result = export_checkpoint(folder, tmp_path / "out", formats=("compact",))
    loaded = load_compact(tmp_path / "out")
    assert torch.equal(logits(loaded, images), logits(model, images))
    assert (loaded.patch_drop.keep, loaded.patch_drop.select) == (0.5, select)
    assert f"selects 0.5 of the tokens ({select})" in result.notes
    torch.nn.init.constant_(model.patch_drop.scorer.weight, 1.0)  # the scorer matters
    assert (logits(model, images) - logits(loaded, images)).abs().max() > 1e-3
    with pytest.raises(CheckpointError, match=r"selects tokens \(.*0\.5 of them\).*compact and onnx"):
        export_checkpoint(folder, tmp_path / "no", formats=("hub",))
    assert not (tmp_path / "no").exists()


def test_a_selector_that_no_method_describes_is_refused(tmp_path: Path) -> None:
    model = insert_selector(vit(), 0.5)
    with pytest.raises(CheckpointError, match="no method that says how many tokens"):
        model_spec(Checkpoint(save_model(tmp_path / "c", model, CONFIG)))


def test_masked_units_are_trimmed_with_their_constants(tmp_path: Path) -> None:
    model = vit()
    masks = {}
    for name, shape in ((n, p.shape) for n, p in model.named_parameters()):
        if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight")):
            masks[name] = torch.ones(shape, dtype=torch.bool)
    for block, (heads, neurons) in {"blocks.0": ([0, 3], range(50)), "blocks.1": ([0, 1, 2, 3], range(128))}.items():
        entries = unit_entries(model, block, heads, list(neurons), ("q", "k", "v", "fc1", "fc2"))
        for name, take in entries.items():
            if name in masks:
                masks[name] &= ~entry_mask(masks[name].shape, take)
    mask_layers(model, masks)
    images = real_inputs(model_spec(Checkpoint(save_model(tmp_path / "c", model, CONFIG))), 5)
    result = export_checkpoint(tmp_path / "c", tmp_path / "out", formats=("compact", "timm"))
    assert 0 < result.checks["logits of the compact model"] <= 1e-5
    small = load_compact(tmp_path / "out")
    sizes = {name: (u.heads, u.neurons) for name, u in units_of(small).items()}
    assert sizes == {"blocks.0": (2, 78), "blocks.1": (1, 1), "blocks.2": (4, 128)}  # one unit has to stay
    assert (logits(small, images) - logits(model, images)).abs().max() <= 1e-5
    plain = timm.create_model("resnet10t", num_classes=3)
    assert trimmed(plain) is plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, this version reads format 1"),
        ({"blocks": {"blocks.0": {"heads": 5, "neurons": 8}}}, "blocks.0: 5 heads"),
        ({"blocks": {"blocks.0": {"heads": 0, "neurons": 8}}}, "blocks.blocks.0.heads: .*greater than or equal to 1"),
        ({"blocks": {"stem": {"heads": 1, "neurons": 8}}}, "stem: 1 heads"),
        ({"blocks": {"blocks.0": {"heads": 1, "neurons": 1}}}, "compact.safetensors: .*size mismatch"),
        ({"more": 1}, "more: Extra inputs"),
        ({"tokens": {"keep": 0.5, "select": "best"}}, "best"),
        ({"arguments": {"depth": 1}}, "blocks.1: "),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    folder, _ = small_checkpoint(tmp_path / "c")
    out = tmp_path / "out"
    export_checkpoint(folder, out, formats=("compact",))
    document = json.loads((out / "compact.json").read_text()) | change
    (out / "compact.json").write_text(json.dumps(document))
    with pytest.raises(EffTrainError, match=words):
        load_compact(out)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder, _ = small_checkpoint(tmp_path / "c")
    out = tmp_path / "out"
    export_checkpoint(folder, out, formats=("compact",))
    document = json.loads((out / "compact.json").read_text())
    document["arguments"] |= {"checkpoint_path": "/no/such.pth", "pretrained": True}
    (out / "compact.json").write_text(json.dumps(document))
    load_compact(out)  # a file cannot make timm load another one
    (out / "compact.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"compact\.safetensors: cannot be read"):
        load_compact(out)
    (out / "compact.json").unlink()
    with pytest.raises(CheckpointError, match=r"compact\.json: cannot be read: No such file"):
        load_compact(out)


def test_a_model_without_heads_has_no_compact_form(tmp_path: Path) -> None:
    config = {"efftrain": {"model": {"name": "resnet10t"}, "data": {**DATA, "resolution": 32}}}
    folder = save_model(tmp_path / "c", timm.create_model("resnet10t", num_classes=10), config)
    with pytest.raises(ModelError, match="no attention blocks"):
        export_checkpoint(folder, tmp_path / "out", formats=("compact",))


@pytest.mark.parametrize(
    "tokens",
    [None, {"keep": 0.5, "select": "gather"}],
    ids=["units", "units-and-tokens"],
)
@pytest.mark.slow
def test_onnx_of_the_small_model(tmp_path: Path, tokens: dict | None) -> None:
    pytest.importorskip("onnxscript")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    folder, model = small_checkpoint(tmp_path / "c", tokens=tokens)
    export_checkpoint(folder, tmp_path / "out", formats=("onnx",))
    path = tmp_path / "out" / "model.onnx"
    stored = [tuple(weight.dims) for weight in onnx.load(path).graph.initializer]
    assert not any(128 in dims for dims in stored if 3 in dims)
    assert (3, 32) in stored or (32, 3) in stored  # three neurons of the last block
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = real_inputs(model_spec(Checkpoint(folder)), 7)
    for count in (1, 7):
        found = session.run(None, {"images": images[:count].numpy()})[0]
        assert np.abs(found - logits(model, images[:count]).numpy()).max() < 1e-4


# the trainer's own model


_STRUCTURED = {"s2vite": {"heads": 0.5, "neurons": 0.6, "update_every": "2st"}}
_REFERENCE = {"s2vite": {**_STRUCTURED["s2vite"], "revive": False}}
_TOKENS = {"svite_tokens": {"keep": 0.5}}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "methods"),
    [
        (3, _STRUCTURED | _TOKENS),
        pytest.param(1, _STRUCTURED, marks=pytest.mark.slow),
        pytest.param(2, _REFERENCE, marks=pytest.mark.slow),
        pytest.param(0, {"svite": {"density": 0.4, "update_every": "2st"}}, marks=pytest.mark.slow),
    ],
    ids=["structured-and-tokens", "structured", "reference", "masks"],
)
def test_same_logits_as_the_run(ranks: Any, tmp_path: Path, stage: int, methods: dict) -> None:
    from tests.distributed import export_jobs

    run = tmp_path / "run"
    found = ranks(export_jobs.sparse_run, str(run), stage, methods)[0]
    images = real_inputs(model_spec(Checkpoint(next(run.glob("checkpoints/step-00000006")))), export_jobs.IMAGES)
    for average in (False, True):
        out = tmp_path / f"out{average}"
        formats = ("compact",) if "svite_tokens" in methods else ("compact", "timm")
        export_checkpoint(run, out, average=average, formats=formats)
        models = [load_compact(out)]
        if "timm" in formats:
            models.append(timm.create_model(f"local-dir:{out}", pretrained=True))
        for model in models:
            assert np.abs(logits(model, images).numpy() - found["logits"][average]).max() <= 1e-5
        if "s2vite" in methods:
            sizes = {(u.heads, u.neurons) for u in units_of(models[0]).values()}
            assert sizes == {(2, 57)}  # of 4 and 96
        if "timm" in formats and "s2vite" in methods:
            live = models[1].blocks[0].mlp.fc2.weight.any(dim=0).nonzero().flatten().tolist()
            assert live != list(range(57))
    names = {path.name for path in (run / "pictures").iterdir()}
    kinds = {"svite": ["masks"], "s2vite": ["heads", "neurons"]}
    for kind in (kind for name in methods for kind in kinds.get(name, ())):
        assert {f"sparse-{kind}-step-{step:08d}.png" for step in (2, 4)} <= names
