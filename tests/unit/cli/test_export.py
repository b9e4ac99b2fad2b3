from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from efftrain_ds.checkpoint.reader import Checkpoint
from efftrain_ds.cli import main as cli
from efftrain_ds.core import packages
from efftrain_ds.core.errors import CheckpointError, ConfigError, EffTrainError
from efftrain_ds.export.images import real_inputs
from efftrain_ds.export.model import load, model_spec
from efftrain_ds.export.write import export_checkpoint
from efftrain_ds.models.masked import mask_layers
from tests.stored import save_model

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
DATA = {"train": "bundled:fashion_mnist/train", "resolution": 28, "mean": [0.3] * 3, "std": [0.35] * 3}


def config_of(**model: Any) -> dict[str, Any]:
    return {"efftrain": {"model": {"name": "vit_tiny_patch16_224", "kwargs": VIT, **model}, "data": DATA}}


def vit(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(4)
    made = timm.create_model("vit_tiny_patch16_224", img_size=28, num_classes=10, **{**VIT, **kwargs})
    for parameter in made.parameters():  # biases and scales that are not 0 and 1
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def test_files_load_with_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    folder = save_model(tmp_path / "run" / "checkpoints" / "step-00000003", model, config_of())
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert result["checkpoint"] == str(folder)
    images = real_inputs(model_spec(Checkpoint(folder)), 5)
    expected = logits(model, images)
    assert expected.std() > 0.1
    by_hand = timm.create_model(result["model"], **result["arguments"])
    timm.models.load_checkpoint(by_hand, str(out / "model.safetensors"))
    whole = timm.create_model(f"local-dir:{out}", pretrained=True)
    for loaded in (by_hand, whole):
        assert (logits(loaded, images) - expected).abs().max() <= 1e-6
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"][9] == "Ankle boot"
    assert config["pretrained_cfg"]["mean"] == [0.3] * 3
    assert config["pretrained_cfg"]["input_size"] == [3, 28, 28]
    assert "license" not in config["pretrained_cfg"]


def test_masked_weights_are_exported_with_their_zeros(tmp_path: Path) -> None:
    model = vit()
    names = ["blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"]
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names}
    mask_layers(model, masks)
    images = torch.rand(5, 3, 28, 28)
    expected = logits(model, images)  # the stored weights are not zero outside of the masks, the forward pass is
    model.blocks[1].attn.qkv.register_buffer("weight_backward", masks[names[1]].clone())
    found = Checkpoint(save_model(tmp_path / "step-00000003", model, config_of()))
    exported = load(model_spec(found), found)
    assert all(not exported.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert (logits(exported, images) - expected).abs().max() <= 1e-6


def test_inputs_are_what_an_evaluation_sees(tmp_path: Path) -> None:
    from efftrain_ds.data import bundled
    from efftrain_ds.data.augment import DeviceAugment
    from efftrain_ds.data.evaluation import EvalLoader
    from efftrain_ds.data.manifest import load_manifest

    spec = model_spec(Checkpoint(save_model(tmp_path / "c", vit(), config_of())))
    manifest = load_manifest(bundled.resolve("bundled:fashion_mnist/val", cache=tmp_path))
    loader = EvalLoader(manifest, rank=0, world=1, batch=2000, resolution=28)
    batch = DeviceAugment(seed=0, mean=spec.data.mean, std=spec.data.std).evaluate(next(iter(loader)))
    loader.close()
    own = real_inputs(spec, 4)
    # the shards are in another order
    distance = (batch.images[:, None] - own[None]).abs().amax(dim=(2, 3, 4)).amin(dim=0)
    assert distance.max() < 1e-5
    assert real_inputs(spec, 2, channels=1).shape == (2, 1, 28, 28)


def test_a_model_at_smaller_depth_gets_the_depth_as_argument(tmp_path: Path) -> None:
    model = vit(depth=2)
    folder = save_model(tmp_path / "c", model, config_of(), methods={"grow": {"search": {"stage": 1}}})
    result = export_checkpoint(folder, tmp_path / "out", formats=("timm",))
    assert result.arguments["depth"] == 2
    assert "supernet" in result.notes[0]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = real_inputs(model_spec(Checkpoint(folder)), 3)
    assert (logits(loaded, images) - logits(model, images)).abs().max() <= 1e-6


def test_buffers_and_other_families(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    config = {"efftrain": {"model": {"name": "resnet10t"}, "data": {**DATA, "resolution": 32}}}
    folder = save_model(tmp_path / "c", model, config)
    result = export_checkpoint(folder, tmp_path / "out", formats=("timm",))
    assert "first rank" in result.notes[0]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = real_inputs(model_spec(Checkpoint(folder)), 3)
    assert (logits(loaded, images) - logits(model, images)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("model", "config", "text"),
    [
        (lambda: vit(embed_dim=32), config_of(), r"timm cannot build vit_tiny.* is \[.*32.*\], timm's is \[.*24.*\]"),
        (lambda: vit(class_token=False, global_pool="avg"), config_of(), "has no cls_token"),
        (
            lambda: vit(depth=5),
            config_of(name="volo_d1_224", kwargs={}),
            "has no .*volo_d1_224|cannot build volo_d1_224",
        ),
        (vit, config_of(name="no_such_model"), "no_such_model"),
        (vit, {"efftrain": {}}, "model.name is not given"),
        (vit, None, "--config FILE"),
    ],
)
def test_what_timm_cannot_build_is_refused(tmp_path: Path, model: Any, config: Any, text: str) -> None:
    folder = save_model(tmp_path / "c", model(), config)
    with pytest.raises(EffTrainError, match=text):
        export_checkpoint(folder, tmp_path / "out", formats=("timm",))
    assert not (tmp_path / "out").exists()


def test_volo_of_less_than_full_depth_is_refused(tmp_path: Path) -> None:
    from efftrain_ds.models.stacks import prepare_growth, truncate

    model = truncate(prepare_growth(timm.create_model("volo_d1_224", img_size=32, num_classes=10)), 12)
    config = {"efftrain": {"model": {"name": "volo_d1_224"}, "data": {**DATA, "resolution": 32}}}
    folder = save_model(tmp_path / "c", model, config)
    with pytest.raises(CheckpointError, match="timm takes no depth for volo_d1_224.*last stage"):
        export_checkpoint(folder, tmp_path / "out", formats=("timm",))


def test_configuration_of_a_loop_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "c", vit(), None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_of()))
    arguments = ["export", str(folder), "--output", str(tmp_path / "out"), "--config", str(config)]
    assert cli.main(arguments) == 0
    assert "largest difference 0" in capsys.readouterr().out


def test_arguments_that_would_load_other_files_are_left_out(tmp_path: Path) -> None:
    kwargs = {**VIT, "checkpoint_path": "/no/such.pth", "pretrained": True, "pretrained_cfg": {"url": "x"}}
    folder = save_model(tmp_path / "c", vit(), config_of(kwargs=kwargs))
    assert not {"checkpoint_path", "pretrained", "pretrained_cfg"} & set(model_spec(Checkpoint(folder)).kwargs)


def test_no_average_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "c", vit(), config_of())
    out = tmp_path / "out"
    assert cli.main(["export", str(folder), "--output", str(out), "--ema"]) == 2
    assert "holds no average of the weights" in capsys.readouterr().err
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert cli.main(["export", str(folder), "--output", str(out)]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    assert not out.exists()


def test_onnx_extra_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxscript; install with: .*efftrain-ds\[export\]"):
        export_checkpoint(tmp_path, tmp_path / "out", formats=("onnx",))


def test_onnx_with_any_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = vit(depth=1)
    folder = save_model(tmp_path / "c", model, config_of())
    result = export_checkpoint(folder, tmp_path / "out", formats=("onnx",))
    assert list(result.files) == ["model.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = real_inputs(model_spec(Checkpoint(folder)), 7)
    for count in (1, 7):
        found = session.run(None, {"images": images[:count].numpy()})[0]
        assert np.abs(found - logits(model, images[:count]).numpy()).max() < 1e-4


def test_model_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = save_model(run / "checkpoints" / "step-00000003", vit(), config_of(pretrained=True))
    events = [
        {"event": "start", "step": 0, "argv": ["launch/train.py", "--local_rank=0", "--ds_config", "a b.json"]},
        {"event": "eval", "step": 2, "top1": 0.1},
        {"event": "eval", "step": 3, "top1": 0.625},
    ]
    (run / "journal.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"torn')
    plan = {"methods": [{"name": "grow", "line": "d2 -> d4"}], "relative_cost": 0.6, "epochs": 4, "data_epochs": 5.5}
    (run / "plan.json").write_text(json.dumps(plan))
    export_checkpoint(folder, tmp_path / "named", formats=("hub",))
    card = (tmp_path / "named" / "README.md").read_text()
    for text in (
        "library_name: timm",
        "# named",
        "62.50 %",
        "grow (d2 -> d4)",
        "x0.60 of 4 dense epochs; 5.5 passes",
        "deepspeed launch/train.py --ds_config 'a b.json'",
        "Started from timm's weights",
        "No licence has been chosen",
        "Fashion-MNIST",
    ):
        assert text in card
    assert "license:" not in card.split("---")[1]


# the trainer's own model


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "stop", "blocks"),
    [pytest.param(1, None, 4, marks=pytest.mark.slow), (3, 3, 3)],
    ids=["grown", "in-between"],
)
def test_same_logits_as_the_run(ranks: Any, tmp_path: Path, stage: int, stop: int | None, blocks: int) -> None:
    from tests.distributed import export_jobs

    found = ranks(export_jobs.grown_run, str(tmp_path / "run"), stage, stop, {})[0]
    assert found["blocks"] == blocks
    for average in (False, True):
        out = tmp_path / f"out{average}"
        result = export_checkpoint(tmp_path / "run", out, average=average, formats=("timm",))
        assert (result.step, result.arguments["depth"]) == (found["step"], blocks)
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        images = real_inputs(model_spec(Checkpoint(Path(result.checkpoint))), export_jobs.IMAGES)
        assert np.abs(logits(model, images).numpy() - found["logits"][average]).max() <= 1e-6
    assert np.abs(found["logits"][True] - found["logits"][False]).max() > 1e-4
