"""``efftrain export``: a checkpoint as timm weights, ONNX, a small model, or a folder for a hub; needs no device."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..core.errors import ConfigError

_FORMATS = ("timm", "onnx", "hub", "compact")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint's model for timm, a hub, or ONNX",
        description="Write the model of a checkpoint in fp32. The files are loaded and compared with the checkpoint "
        "before they are put in place. Needs neither DeepSpeed's engine nor a device.",
    )
    parser.add_argument(
        "path",
        metavar="CHECKPOINT",
        help="a checkpoint, a folder of checkpoints, a run's output folder, or a subnet.safetensors of a search",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--ema", action="store_true", help="export the average of the weights")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=_FORMATS,
        default=["hub"],
        dest="formats",
        help="timm: model.safetensors and config.json; hub: these and a model card (default); onnx: model.onnx; "
        "compact: only live heads and neurons, for efftrain_ds.export.compact.load_compact",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration with efftrain.model, for checkpoints of a loop of your own"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Export and say what was written.

    Raises:
        CheckpointError: damaged, or not expressible in the format.
        ModelError: not expressible as ONNX, or as a compact model.
        ConfigError: a package is missing, or the configuration cannot be read.
    """
    if args.path.endswith(".safetensors"):
        return _subnet(args)
    from dataclasses import asdict

    from ..export.write import export_checkpoint

    config = None
    if args.config is not None:
        from pathlib import Path

        from ..config.jsonfile import read_json

        found, _ = read_json(Path(args.config))
        if not isinstance(found, dict):
            raise ConfigError(f"{args.config}: allowed: an object of DeepSpeed's keys")
        config = found
    result = export_checkpoint(args.path, args.output, average=args.ema, formats=args.formats, config=config)
    print(json.dumps(asdict(result), indent=1) if args.json else "\n".join(_lines(result)))
    return 0


def _subnet(args: argparse.Namespace) -> int:
    """Export a searched sub-network."""
    from ..export.subnet import export_subnet

    formats = ["onnx"] if args.formats == ["hub"] else args.formats
    result = export_subnet(args.path, args.output, formats)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    from ..core.text import bytes_text
    from .screen import facts

    side, inputs = result["config"]["resolution"], result["input"]
    rows = [
        ("subnet", f"{result['subnet']}, {result['macs']:,} MACs, {result['parameters']:,} parameters"),
        ("input", f"{side} px, mean and std of the data: not known, subnet.json does not stand beside the weights"),
    ]
    if inputs is not None:
        mean, std = (", ".join(f"{value:g}" for value in inputs[key]) for key in ("mean", "std"))
        rows[1] = ("input", f"{side} px, mean {mean}, std {std}, {inputs['interpolation']}, crop {inputs['crop']:g}")
    names = [("", f"{args.output}/{name}  {bytes_text(size)}") for name, size in result["files"].items()]
    rows += [("written", names[0][1]), *names[1:]]
    rows += [("checked", f"{what}: largest difference {value:.1g}") for what, value in result["checks"].items()]
    if "config.json" in result["files"]:
        rows.append(("load", f'timm.create_model("local-dir:{args.output}", pretrained=True)'))
    if "model.onnx" in result["files"]:
        rows.append(("load", f'onnxruntime.InferenceSession("{args.output}/model.onnx")'))
    print("\n".join(facts(rows)))
    return 0


def _lines(result: Any) -> list[str]:
    from ..core.text import bytes_text
    from .screen import facts

    arguments = ", ".join(f"{key}={value!r}" for key, value in result.arguments.items())
    rows = [
        ("checkpoint", f"{result.checkpoint} (step {result.step:,}, all files verified)"),
        ("model", f"{result.model}, {result.parameters:,} parameters, fp32" + ", average" * result.average),
        ("", arguments),
    ]
    names = [("", f"{result.output}/{name}  {bytes_text(size)}") for name, size in result.files.items()]
    rows += [("written", names[0][1]), *names[1:]]
    rows += [("checked", f"{what}: largest difference {value:.1g}") for what, value in result.checks.items()]
    rows += [("note", note) for note in result.notes]
    if "config.json" in result.files:
        rows.append(("load", f'timm.create_model("local-dir:{result.output}", pretrained=True)'))
    if "compact.json" in result.files:
        rows.append(("load", f'efftrain_ds.export.compact.load_compact("{result.output}")'))
    return facts(rows)
