"""ONNX: written by torch, checked with ONNX Runtime on real images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..core import packages
from ..core.errors import ModelError
from ..models.onnx import onnx_program

TOLERANCE = 1e-4


def require() -> None:
    """Refuse early where a package is missing.

    Raises:
        ConfigError: names it and how to get it.
    """
    packages.require("efftrain export: ONNX", packages.ONNX, "export")


def write(model: nn.Module, images: Tensor, path: Path, *, batch: int | None = None) -> float:
    """Write `model`, run it with ONNX Runtime and compare.

    Args:
        model: in evaluation mode, built with timm's ``exportable=True``.
        images: real inputs [N, C, H, W], N at least 3.
        path: the file.
        batch: the only batch size of the file; None for any.

    Returns:
        Largest difference of a logit, over batches of 1, 2 and N images where the file takes them.

    Raises:
        ModelError: torch cannot express the model in ONNX, or the results differ by more than `TOLERANCE`.
    """
    import onnxruntime

    program = onnx_program(
        model,
        images[: batch or 2],
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},) if batch is None else None,
    )
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for part in (images[:1], images[:2], images) if batch is None else images.split(batch):
        with torch.no_grad():
            expected = model(part)
        found = torch.from_numpy(session.run(["logits"], {"images": part.numpy()})[0])
        if found.shape != expected.shape:
            raise ModelError(f"{path}: gives {list(found.shape)} for {list(part.shape)}, not {list(expected.shape)}")
        worst = max(worst, float((found - expected).abs().max()))
    if not worst <= TOLERANCE:
        raise ModelError(f"{path}: logits differ by {worst:.2g} from the model's, allowed: {TOLERANCE:g}")
    return worst
