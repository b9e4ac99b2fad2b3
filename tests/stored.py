"""Checkpoints made by hand for the tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from efftrain_ds.checkpoint.plain import to_plain


def save_model(
    folder: Path,
    model: torch.nn.Module,
    config: dict | None,
    *,
    methods: Any = None,
    architecture: Any = None,
    **more: Any,
) -> Path:
    """A checkpoint of one rank in the form on disk, without an average; frozen parameters stand apart.

    Args:
        folder: made here.
        model: its parameters and buffers are stored.
        config: resolved configuration, or None.
        methods: state of methods by name.
        architecture: what methods say of the architecture, by name.
        **more: further members of the document.
    """
    folder.mkdir(parents=True)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {f"frozen.{n}": p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    fragments, at = [], 0
    for name, value in trained.items():
        fragments.append([name, 0, value.numel(), 0, at])
        at += value.numel()
    flat = torch.cat([value.reshape(-1) for value in trained.values()])
    local = {f"local.buffer.{n}": b.clone() for n, b in model.named_buffers()}
    save_file({"fp32.0": flat, **local}, str(folder / "rank-00000.safetensors"))
    index = {"keys": ["fp32"], "fragments": fragments, "scalars": [{}]}
    (folder / "rank-00000.json").write_text(json.dumps(index))
    client = {"config": json.dumps(config)} if config is not None else {}
    extra = {"efftrain": {"methods": methods or {}}, "client": client}
    if architecture is not None:
        extra["efftrain"]["architecture"] = {"methods": architecture}
    document = {
        "format": 1, "step": 3, "world": 1, "zero_stage": 1, "groups": [], "ema": None, **more,
        "shapes": {n: list(p.shape) for n, p in trained.items()},
        "extra": to_plain(extra, "extra", frozen),
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(document))
    save_file(frozen, str(folder / "state.safetensors"))
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder
