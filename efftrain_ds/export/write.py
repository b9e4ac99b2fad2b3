"""Write a checkpoint's model in the formats that were asked for, and check what was written by loading it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.reader import AVERAGE, Checkpoint
from ..checkpoint.survey import newest
from ..core.errors import CheckpointError, EffTrainError
from ..data import bundled
from ..data.manifest import load_manifest
from ..models.units import units_of
from ..planning import with_labels
from . import compact, onnx
from .card import Card, run_facts
from .images import for_channels, real_inputs
from .model import ModelSpec, full_width, load, model_spec

FORMATS = ("timm", "onnx", "hub", "compact")
WEIGHTS, CONFIG, ONNX, CARD = "model.safetensors", "config.json", "model.onnx", "README.md"
TOLERANCE = 1e-6
_SUMS = 1e-5
"""Largest difference, over the largest logit, where zeros are added to sums or constants are moved into a bias."""
_IMAGES = 8
SOURCE_WORDS = ("license", "origin_url", "paper_name", "paper_ids", "description", "notes", "tag")
"""Keys of timm's configuration that speak of other weights."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        checkpoint: the folder it came from.
        output: the folder it is in.
        step: optimizer step.
        model: name for `timm.create_model`.
        arguments: its arguments.
        parameters: number of parameters of the model as it was trained (masks counted in full).
        average: the average of the weights was taken.
        files: name and bytes of each file.
        checks: what was compared, in words, with the largest difference.
        notes: what the reader should know.
    """

    checkpoint: str
    output: str
    step: int
    model: str
    arguments: dict[str, Any]
    parameters: int
    average: bool
    files: dict[str, int] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    average: bool = False,
    formats: Sequence[str] = ("hub",),
    config: Mapping[str, Any] | None = None,
) -> Exported:
    """Export the model of a checkpoint; needs no engine and no device.

    Args:
        path: a checkpoint, a folder of checkpoints or a run folder (then the one that a resume would take). Every file
            is verified first.
        output: folder for the files; made if it is not there. Files of the same names are replaced, after the new ones
            have passed their checks.
        average: take the average of the weights.
        formats: of `FORMATS`. "timm": weights and config.json; a model with fewer heads or neurons gets its full width
            with zeros. "hub": these and a model card. "compact": the small model for `compact.load_compact`. "onnx":
            the small model as a file with a batch of any size.
        config: configuration with "efftrain.model" and "efftrain.data", for checkpoints that hold none.

    Raises:
        CheckpointError: damaged, without the average, or not expressible as a timm model.
        ModelError: not expressible as ONNX, or as a compact model.
        ConfigError: a package for ONNX is missing.
    """
    if "onnx" in formats:
        onnx.require()
    folder = newest(Path(path))
    found = Checkpoint(folder)
    if average and AVERAGE not in found.keys:
        raise CheckpointError(f"{folder}: holds no average of the weights (efftrain.model.ema was not set)")
    spec = model_spec(found, config)
    model = load(spec, found, average=average)
    output = Path(output)
    partial = output / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        checks = _write(model, spec, found, partial, formats, average)
        names = _move(partial, output)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()  # made here, for nothing
    return Exported(
        checkpoint=str(folder),
        output=str(output),
        step=found.step,
        model=spec.name,
        arguments=arguments_of(spec, model),
        parameters=sum(p.numel() for p in model.parameters()),
        average=average,
        files={name: (output / name).stat().st_size for name in names},
        checks=checks,
        notes=tuple(_notes(spec, found, model)),
    )


def arguments_of(spec: ModelSpec, model: nn.Module) -> dict[str, Any]:
    """Arguments with which `timm.create_model(spec.name, ...)` makes the exported model."""
    made = dict(getattr(model, "_model_args", None) or {**spec.kwargs, "num_classes": spec.num_classes})
    return {key: value for key, value in made.items() if key != "pretrained"}


def _write(
    model: nn.Module, spec: ModelSpec, found: Checkpoint, folder: Path, formats: Sequence[str], average: bool
) -> dict[str, float]:
    checks: dict[str, float] = {}
    channels = _channels(model)
    images = real_inputs(spec, _IMAGES, channels)
    wide = model
    if "timm" in formats or "hub" in formats:
        wide = full_width(spec, found, model)
        if wide is not model:
            checks["logits at full width"] = _same(model, wide, images, folder)
        _write_timm(wide, spec, found, folder)
        checks["logits of the files loaded with timm"] = _check_timm(wide, spec, folder, images)
    if "compact" in formats:
        small = compact.trimmed(load(spec, found, average=average))
        checks["logits of the compact model"] = _same(model, small, images, folder)
        _write_compact(small, spec, found, folder)
        checks["logits of the files loaded with load_compact"] = _alike(
            small, compact.load_compact(folder), images, folder
        )
    if "onnx" in formats:
        exportable = compact.trimmed(load(spec, found, average=average, exportable=True))
        checks["logits of ONNX Runtime"] = onnx.write(exportable, images, folder / ONNX)
    if "hub" in formats:
        config = json.loads((folder / CONFIG).read_text())
        card = Card(
            name=folder.parent.resolve().name,
            model=spec.name,
            arguments=arguments_of(spec, model),
            parameters=sum(p.numel() for p in wide.parameters()),
            input_size=tuple(config["pretrained_cfg"]["input_size"]),
            step=found.step,
            average=average,
            pretrained=spec.pretrained,
            onnx="onnx" in formats,
            compact="compact" in formats,
            live=live_words(spec, model),
            run=run_facts(found, average=average),
        )
        (folder / CARD).write_text(card.text(), encoding="utf-8")
    return checks


def live_words(spec: ModelSpec, model: nn.Module) -> str:
    """For example ``"48 of 72 heads, 11,052 of 18,432 neurons"``; "" for a model of full width."""
    if not spec.units:
        return ""
    full, small = units_of(spec.create("meta", plain=True)), units_of(model)
    words = []
    for kind in ("heads", "neurons"):
        live, total = (sum(getattr(units, kind) for units in of.values()) for of in (small, full))
        words.append(f"{live:,} of {total:,} {kind}")
    return ", ".join(words)


def _write_compact(small: nn.Module, spec: ModelSpec, found: Checkpoint, folder: Path) -> None:
    """``compact.safetensors`` and ``compact.json``."""
    data, channels = spec.data, _channels(small)
    inputs = compact.InputSettings(
        size=(channels, spec.resolution, spec.resolution),
        mean=for_channels(data.mean, channels),
        std=for_channels(data.std, channels),
        interpolation=data.interpolation,
        crop=data.eval_crop,
    )
    arguments, labels = arguments_of(spec, small), _labels(found, spec)
    config = compact.config_of(small, spec.name, arguments, spec.num_classes, inputs, labels)
    compact.write(small, config, folder)


def _write_timm(model: nn.Module, spec: ModelSpec, found: Checkpoint, folder: Path) -> None:
    """``model.safetensors`` and ``config.json``, by timm's own function."""
    import timm

    data, channels = spec.data, _channels(model)
    labels = _labels(found, spec)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(labels)} if labels else None,
        safe_serialization=True,
        data_config={
            "input_size": (channels, spec.resolution, spec.resolution),
            "mean": for_channels(data.mean, channels),
            "std": for_channels(data.std, channels),
            "interpolation": data.interpolation,
            "crop_pct": data.eval_crop,
        },
    )
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for key in SOURCE_WORDS:
        config["pretrained_cfg"].pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _check_timm(model: nn.Module, spec: ModelSpec, folder: Path, images: Tensor) -> float:
    """Load the files in both ways that timm has and compare logits on real images.

    Raises:
        CheckpointError: they differ.
    """
    import timm

    first = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    second = timm.create_model(spec.name, **arguments_of(spec, model)).eval()
    timm.models.load_checkpoint(second, str(folder / WEIGHTS))
    return max(_alike(model, other, images, folder) for other in (first, second))


def _alike(model: nn.Module, loaded: nn.Module, images: Tensor, folder: Path) -> float:
    """Largest difference of a logit between a model and what was read from its files.

    Raises:
        CheckpointError: it is too large.
    """
    worst = _distance(model, loaded, images)
    if not worst <= TOLERANCE:
        raise CheckpointError(f"{folder}: logits of the written files differ by {worst:.2g} from the checkpoint's")
    return worst


@torch.no_grad()
def _same(model: nn.Module, other: nn.Module, images: Tensor, folder: Path) -> float:
    """Largest difference of a logit between a model and one of another width that computes the same.

    Raises:
        CheckpointError: it is more than rounding.
    """
    worst = _distance(model, other, images)
    if not worst <= _SUMS * max(1.0, float(model(images).abs().max())):
        raise CheckpointError(f"{folder}: the model in its other width differs by {worst:.2g} from the checkpoint's")
    return worst


@torch.no_grad()
def _distance(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    return float((one(images) - other(images)).abs().max())


def _channels(model: nn.Module) -> int:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels


def _labels(found: Checkpoint, spec: ModelSpec) -> Sequence[str] | None:
    """Class names of the training data, where it is at hand."""
    where = spec.data.train
    try:
        names = bundled.classes(where) if spec.data.labels is None else None
        if names is None and where and Path(bundled.resolve(where)).exists():
            manifest = with_labels(load_manifest(bundled.resolve(where)), spec.data)
            same = manifest.digest == (found.client.get("data") or {}).get("manifest")
            names = manifest.classes if same else None
    except (EffTrainError, OSError):
        return None
    return names if names is not None and len(names) == spec.num_classes else None


def _move(partial: Path, output: Path) -> list[str]:
    names = sorted(p.name for p in partial.iterdir())
    for name in names:
        (partial / name).replace(output / name)
    return names


def _notes(spec: ModelSpec, found: Checkpoint, model: nn.Module) -> list[str]:
    notes = []
    if spec.units:
        notes.append(f"{live_words(spec, model)} live; timm's model has zeros at the others")
    if spec.tokens is not None:
        notes.append(f"selects {spec.tokens['keep']:g} of the tokens ({spec.tokens['select']})")
    for name, state in found.methods.items():
        if isinstance(state, dict) and state.get("search"):
            notes.append(
                f"{name}: a search is going on at this step; exported is the whole supernet, as evaluations see it"
            )
    if any(module.running_mean is not None for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        notes.append("running statistics of batch norm are those of the first rank")
    return notes
