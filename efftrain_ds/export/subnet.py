"""A searched sub-network, from its own file, as timm weights or ONNX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, ModelError
from ..models.elastic import PlainConfig, PlainSpace, load_extracted
from . import onnx
from .compact import InputSettings
from .write import SOURCE_WORDS

FORMATS = ("timm", "onnx")
_NAME = "vit_tiny_patch16_224"
"""Any plain vision transformer of timm: the arguments say everything."""
TOLERANCE = 1e-5
RESULT = "subnet.json"
"""File of the search beside the weights."""


def export_subnet(path: str | Path, output: str | Path, formats: Sequence[str]) -> dict[str, Any]:
    """Write a sub-network that "efftrain search subnet" found, and check what was written by loading it.

    Args:
        path: its ``subnet.safetensors``.
        output: folder for the files.
        formats: "timm" (weights and config.json; plain vision transformers with equal layers only) and "onnx" (images
            of the sub-network's own resolution; a batch of any size, of one image where there are convolution stages;
            model.json says how images become inputs).

    Returns:
        What was written: "subnet", "output", "config", "macs", "parameters", "input" (how images become inputs, None
        where the search's own file does not stand beside the weights), "files" (bytes by name), "checks".

    Raises:
        ModelError: the file holds no sub-network, or it cannot be expressed in a format.
        CheckpointError: the folder cannot be written, or what was written computes something else.
        ConfigError: a package for ONNX is missing.
    """
    wrong = sorted(set(formats) - set(FORMATS))
    if wrong or not formats:
        raise ModelError(
            f"{path}: a sub-network cannot be written as {', '.join(wrong)}; allowed: {', '.join(FORMATS)}"
        )
    if "onnx" in formats:
        onnx.require()
    net, space, config = load_extracted(path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, space.in_chans, config.resolution, config.resolution, generator=generator)
    inputs = _inputs(Path(path))
    output = Path(output)
    partial, checks = output / ".partial", {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if "timm" in formats:
            checks["logits of the files loaded with timm"] = _write_timm(net, space, config, images, partial, inputs)
        if "onnx" in formats:
            checks["logits of ONNX Runtime"] = onnx.write(
                *(net, images, partial / "model.onnx"), batch=None if isinstance(space, PlainSpace) else 1
            )
            if inputs is not None:
                text = json.dumps({"input": "images", "output": "logits", **inputs.model_dump()}, indent=1)
                (partial / "model.json").write_text(text + "\n", encoding="utf-8")
        names = sorted(file.name for file in partial.iterdir())
        for name in names:
            (partial / name).replace(output / name)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
    return {
        "subnet": str(path),
        "output": str(output),
        "config": config.to_dict(),
        "macs": space.macs(config),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "input": None if inputs is None else inputs.model_dump(mode="json"),
        "files": {name: (output / name).stat().st_size for name in names},
        "checks": checks,
    }


class SubnetInput(InputSettings):
    """How an image becomes an input of a searched sub-network."""

    loaded: int
    """Side to which the search loaded the images (`interpolation`, then the centre crop); the network resized them
    from there to its own side, bicubic. Loading them at that side at once changes little."""


def _inputs(path: Path) -> SubnetInput | None:
    """What the search that wrote the weights left beside them; None without it, or of another version."""
    try:
        found = json.loads(path.with_name(RESULT).read_text(encoding="utf-8"))["input"]
        return SubnetInput.model_validate_json(json.dumps(found))  # JSON has lists for tuples
    except (OSError, ValueError, LookupError, TypeError):
        return None


def timm_arguments(space: Any, config: Any) -> dict[str, Any]:
    """Arguments with which timm builds a sub-network.

    Raises:
        ModelError: timm has no such model: another kind of network, layers of several sizes, or heads that do not make
            up the width.
    """
    advice = "; allowed: the format onnx, or efftrain_ds.models.elastic.load_extracted"
    if not isinstance(space, PlainSpace) or not isinstance(config, PlainConfig):
        raise ModelError(f"timm's registry has no networks of the space {space.name}{advice}")
    if len(set(config.heads)) > 1 or len(set(config.mlp)) > 1:
        raise ModelError(f"its layers have different sizes (heads {config.heads}, mlp {config.mlp}){advice}")
    if config.heads[0] * space.head_dim != config.width:
        raise ModelError(
            f"{config.heads[0]} heads of {space.head_dim} at width {config.width}; timm's have width / heads{advice}"
        )
    return {
        "img_size": config.resolution,
        "patch_size": space.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads[0],
        "mlp_ratio": config.mlp[0],
        "num_classes": space.num_classes,
        "in_chans": space.in_chans,
        "class_token": space.class_token,
        "global_pool": "token" if space.class_token else "avg",
        "qkv_bias": space.qkv_bias,
        "qk_norm": space.qk_norm,
        **({"init_values": 1e-5} if space.layer_scale else {}),
    }


def _write_timm(
    net: nn.Module, space: Any, config: Any, images: Tensor, folder: Path, inputs: SubnetInput | None
) -> float:
    import timm

    arguments = timm_arguments(space, config)
    model = timm.create_model(_NAME, **arguments).eval()
    model.load_state_dict(net.state_dict())
    timm.models.save_for_hf(
        model,
        str(folder),
        safe_serialization=True,
        model_config={"model_args": {key: value for key, value in arguments.items() if key != "num_classes"}},
        data_config=_data_config(space, config, inputs),
    )
    path = folder / "config.json"
    described = json.loads(path.read_text())
    for key in SOURCE_WORDS:
        described["pretrained_cfg"].pop(key, None)
    path.write_text(json.dumps(described, indent=2) + "\n")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        worst = float((loaded(images) - net(images)).abs().max())
    if not worst <= TOLERANCE:
        raise CheckpointError(f"{folder}: logits of the written files differ by {worst:.2g} from the sub-network's")
    return worst


def _data_config(space: Any, config: Any, inputs: SubnetInput | None) -> dict[str, Any]:
    """Settings of the input as timm names them."""
    found: dict[str, Any] = {"input_size": (space.in_chans, config.resolution, config.resolution)}
    if inputs is not None:
        found |= {"mean": inputs.mean, "std": inputs.std, "interpolation": inputs.interpolation}
        found["crop_pct"] = inputs.crop
    return found
