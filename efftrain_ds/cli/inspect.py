"""``efftrain inspect``: what is in a checkpoint, and which one a resume would take. Nothing of it is executed."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the verb to the command's subparsers."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what is in a checkpoint, and whether it is good",
        description="Show what is in a checkpoint. Only JSON and safetensors are read; nothing of it is executed. "
        "Exit code 2 where the checkpoint is damaged, or no checkpoint of the folder is good.",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, a folder of checkpoints, or a run's output folder")
    parser.add_argument(
        "--verify", action="store_true", help="compare SHA-256 of every file with the manifest (sizes always are)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the checkpoint, or the table of a folder.

    Returns:
        0, or 2 where nothing good was found.

    Raises:
        CheckpointError: the checkpoint is damaged, or the path is none.
    """
    from ..checkpoint import survey
    from ..checkpoint.reader import Checkpoint
    from ..core.errors import CheckpointError

    path = Path(args.path)
    try:
        kind = survey.kind_of(path)
        if kind != "checkpoint":
            root = path / survey.FOLDER if kind == "run" else path
            return _folder(root, args)
        found = Checkpoint(path, hashes=args.verify)
        facts = survey.describe(found)
    except CheckpointError as error:
        if not args.json:
            raise
        print(json.dumps({"ok": False, "path": str(path), "error": str(error)}, indent=1))
        return error.exit_code
    facts["verified"] = "sha256" if args.verify else "sizes"
    facts["data_samples"] = _epoch_samples(facts)
    if args.json:
        print(json.dumps({"ok": True, **facts}, indent=1))
    else:
        print("\n".join(checkpoint_lines(facts)))
    return 0


def _folder(root: Path, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..checkpoint import survey

    entries, chosen = survey.survey(root, hashes=args.verify)
    if args.json:
        rows = [asdict(entry) for entry in entries]
        print(
            json.dumps({"ok": chosen is not None, "path": str(root), "resume": chosen, "checkpoints": rows}, indent=1)
        )
    else:
        print("\n".join(folder_lines(str(root), entries, chosen, hashes=args.verify)))
    return 0 if chosen is not None else 2


def folder_lines(root: str, entries: Any, chosen: str | None, *, hashes: bool) -> list[str]:
    """The table of a folder of checkpoints."""
    from ..core.text import align, bytes_text
    from .screen import wrapped

    if not entries:
        return [f"{root}: no checkpoint yet"]
    rows = [["checkpoint", "step", "written", "ranks", "ZeRO", "size", "verdict"]]
    for entry in entries:
        rows.append(
            [
                entry.name,
                "-" if entry.step is None else f"{entry.step:,}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.written)),
                "-" if entry.world is None else str(entry.world),
                "-" if entry.zero_stage is None else str(entry.zero_stage),
                bytes_text(entry.bytes),
                entry.verdict + (" <- a resume takes this one" if entry.name == chosen else ""),
            ]
        )
    lines = [f"{root}: {len(entries)} checkpoint{'s' if len(entries) != 1 else ''}", ""]
    lines += align(rows, left=(0, 6))
    for entry in entries:
        if entry.why:
            lines += wrapped(f"  {entry.name}: ", entry.why, indent=len(entry.name) + 4)
    if chosen is None:
        lines += ["", "No checkpoint can be used; a resume stops here with this reason."]
    elif not hashes:
        lines += ["", "Sizes were compared, contents not: add --verify (a resume always verifies)."]
    return lines


def checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    """Everything about one checkpoint."""
    from ..core.text import align, bytes_text, duration_text
    from .screen import facts as rows_of

    model, versions = facts["model"], facts["versions"]
    verified = (
        "SHA-256 of all files verified"
        if facts["verified"] == "sha256"
        else "sizes compared (--verify compares SHA-256 too)"
    )
    rows = [
        ("checkpoint", facts["path"]),
        ("", f"{len(facts['files'])} files, {bytes_text(facts['bytes'])}, {verified}"),
        (
            "run",
            f"step {facts['step']:,}, {_count(facts['world'], 'rank')}, ZeRO-{facts['zero_stage']}, torch "
            f"{versions.get('torch', '?')}, DeepSpeed {versions.get('deepspeed', '?')}",
        ),
        ("model", _model_words(model)),
        *([("", f"architecture {model['digest']}")] if model["digest"] else []),
    ]
    for index, event in enumerate(facts["history"] or ()):
        rows.append(("" if index else "history", f"step {event['step']:,}: {event['reason']}"))
    if facts["history"] == []:
        rows.append(("history", "no change of parameters so far"))
    rows.append(("optimizer", _optimizer_words(facts["state"])))
    lines = rows_of(rows)
    table = [["group", "lr", "weight decay", "tensors", "parameters"]]
    for number, group in enumerate(facts["groups"]):
        table.append(
            [
                str(group["name"] or number),
                _number(group["lr"]),
                _number(group["weight_decay"]),
                *(f"{group[key]:,}" if key in group else "-" for key in ("tensors", "parameters")),
            ]
        )
    lines += [" " * 12 + line for line in align(table, left=(0,))]
    rows = [("scheduler", _words(facts["scheduler"]))]
    counters = facts["counters"] or {}
    if counters.get("skipped_steps"):
        rows.append(("skipped", f"{counters['skipped_steps']:,} of {counters.get('global_steps', 0):,} steps"))
    scale = (facts["scaler"] or {}).get("cur_scale")
    if model["dtype"] == "fp16" and scale is not None:
        rows.append(("loss scale", f"{scale:g}"))
    ema = facts["ema"]
    rows.append(("average", "none" if ema is None else f"decay {ema['decay']:g}, {_count(ema['updates'], 'update')}"))
    for index, (name, state) in enumerate(facts["methods"].items()):
        rows.append(("" if index else "methods", f"{name}: {_words(state)}"))
    if not facts["methods"]:
        rows.append(("methods", "none"))
    rows.append(("data", _data_words(facts["data"], facts["data_samples"])))
    if facts["best"]:
        rows.append(("best", ", ".join(f"{k} {_score(k, v)}" for k, v in facts["best"].items())))
    if facts["seconds"]:
        rows.append(("time", ", ".join(f"{k} {duration_text(v)}" for k, v in facts["seconds"].items())))
    digest, plan = facts["config_digest"], facts["plan"]
    rows.append(("config", f"digest {digest}, plan {plan}" if digest else "none stored (embedded use)"))
    lines += rows_of(rows)
    files = [[name, bytes_text(entry["bytes"]), entry["sha256"][:16]] for name, entry in sorted(facts["files"].items())]
    lines += align([["files       name", "size", "sha256"], *([f"            {n}", s, d] for n, s, d in files)], (0, 2))
    return lines


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def _model_words(model: dict[str, Any]) -> str:
    name = f"{model['name']}, " if model["name"] else ""
    precision = f", trained in {model['dtype']}" if model["dtype"] else ""
    frozen = f", {model['frozen']:,} of them frozen" if model["frozen"] else ""
    buffers = f", {_count(model['buffers'], 'buffer')}" if model["buffers"] else ""
    return (
        f"{name}{model['parameters']:,} parameters in {_count(model['tensors'], 'tensor')}{frozen}{buffers}; "
        f"masters fp32{precision}"
    )


def _optimizer_words(state: dict[str, Any]) -> str:
    if not state["keys"]:
        return "no state yet"
    steps = state["steps"]
    count = f", step {steps[0]:,}" if len(steps) == 1 else f", steps {steps[0]:,} to {steps[-1]:,}" if steps else ""
    return ", ".join(state["keys"]) + count


def _words(state: Any) -> str:
    """State of a method or scheduler in words: short values as they are, long ones by their length."""
    if state in (None, {}, []):
        return "no state" if state != [] else "none"
    if isinstance(state, dict):
        return ", ".join(f"{key} {_words(value)}" if value is not None else f"no {key}" for key, value in state.items())
    if isinstance(state, list):
        text = json.dumps(state)
        return text if len(text) <= 60 else f"{len(state)} values"
    return _number(state) if isinstance(state, float) else str(state)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _score(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if "top" in name else f"{value:.4g}"


def _data_words(data: dict[str, Any] | None, samples: int | None) -> str:
    if not isinstance(data, dict) or "consumed" not in data:
        return "no position stored"
    epoch = f"epoch {data['consumed'] / samples:.2f}, " if samples else ""
    return (
        f"{epoch}{data['consumed']:,} samples consumed; seed {data.get('seed')}, {data.get('streams')} streams, "
        f"data set {str(data.get('manifest', '?'))[:16]}"
    )


def _epoch_samples(facts: dict[str, Any]) -> int | None:
    """Samples of one epoch by the bundled data or the manifest, if it is at hand and is the same data."""
    from ..core.errors import EffTrainError
    from ..data import bundled
    from ..data.manifest import load_manifest

    section = ((facts["config"] or {}).get("efftrain") or {}).get("data") or {}
    where = section.get("train")
    if not isinstance(where, str) or not where:
        return None
    try:
        count = bundled.samples(where)
        if count is None and Path(where).exists():
            manifest = load_manifest(where)
            count = manifest.samples if manifest.digest == (facts["data"] or {}).get("manifest") else None
    except (EffTrainError, OSError):
        count = None
    return count if count is not None else section.get("samples")
