"""The model card: what the run folder tells about a model, as README.md for a model hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.reader import Checkpoint
from ..core.redact import redacted
from ..core.text import duration_text
from ..observe.journal import read_journal

JOURNAL, PLAN = "journal.jsonl", "plan.json"


@dataclass(frozen=True)
class RunFacts:
    """What the run behind a checkpoint says about itself; empty or None where it does not.

    Attributes:
        top1: held-out top-1 of exactly this step (of the average, where that was exported).
        samples: size of the held-out split as it is named in the configuration.
        train: training data as it is named in the configuration.
        methods: (name, one line) in run order.
        relative_cost: planned cost over that of dense training of the same budget.
        epochs: budget in dense epochs.
        data_epochs: passes over the data.
        seconds: training time so far.
        ranks: processes.
        commands: how the run was started and resumed.
        versions: of torch and DeepSpeed.
        config: resolved configuration.
    """

    top1: float | None = None
    val: str | None = None
    train: str | None = None
    methods: tuple[tuple[str, str], ...] = ()
    relative_cost: float | None = None
    epochs: float | None = None
    data_epochs: float | None = None
    seconds: float | None = None
    ranks: int | None = None
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None


def run_facts(found: Checkpoint, *, average: bool) -> RunFacts:
    """Read the journal and the plan beside a checkpoint; what is missing or damaged is left out."""
    run = found.folder.resolve().parent.parent
    config = redacted(found.config or {})
    section = config.get("efftrain") or {}
    data = section.get("data") or {}
    events = list(read_journal(run / JOURNAL)) if (run / JOURNAL).is_file() else []
    key = "ema_top1" if average else "top1"
    scores = [e[key] for e in events if e.get("event") == "eval" and e.get("step") == found.step and key in e]
    commands = [
        _command(redacted(e["argv"])) for e in events if e.get("event") in ("start", "resume") and e.get("argv")
    ]
    plan = _plan(run / PLAN)
    seconds = (found.client.get("chrono") or {}).get("train")
    return RunFacts(
        top1=float(scores[-1]) if scores else None,
        val=data.get("val"),
        train=data.get("train"),
        methods=tuple((m["name"], m.get("line", "")) for m in plan.get("methods", ()))
        or tuple((name, "") for name in found.methods),
        relative_cost=plan.get("relative_cost"),
        epochs=plan.get("epochs"),
        data_epochs=plan.get("data_epochs"),
        seconds=float(seconds) if seconds is not None else None,
        ranks=found.world,
        commands=tuple(dict.fromkeys(commands)),
        versions=found.document.get("versions"),
        config=config or None,
    )


def _plan(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _command(argv: list[str]) -> str:
    words = [word for word in argv if not word.startswith("--local_rank")]
    return shlex.join(["deepspeed", *words])


@dataclass(frozen=True)
class Card:
    """What the card is made from; see `export.write.Exported` for the fields of the same names."""

    name: str
    model: str
    arguments: Mapping[str, Any]
    parameters: int
    input_size: tuple[int, ...]
    step: int
    average: bool
    pretrained: bool
    onnx: bool
    run: RunFacts
    compact: bool = False
    live: str = ""

    def text(self) -> str:
        """The card as Markdown with the front matter of model hubs."""
        parts = [_FRONT, f"# {self.name}\n", self._summary(), "## How it was trained\n", self._training()]
        if self.run.commands:
            parts.append("```\n" + "\n".join(self.run.commands) + "\n```\n")
        if self.run.config is not None:
            config = json.dumps(self.run.config, indent=1)
            parts.append(f"<details><summary>Configuration</summary>\n\n```json\n{config}\n```\n\n</details>\n")
        parts += ["## Use\n", self._use(), "## Licence\n", self._licence()]
        return "\n".join(parts)

    def _summary(self) -> str:
        size = " x ".join(str(n) for n in self.input_size)
        weights = "the average of the weights" if self.average else "the weights"
        rows = [
            ("Model", f"`{self.model}` of timm, {self.parameters:,} parameters"),
            ("Weights", f"{weights} at step {self.step:,}, fp32"),
            ("Input", size),
        ]
        if self.live:
            rows.append(("Live units", f"{self.live}; zeros stand at the others"))
        if self.run.train:
            rows.append(("Training data", f"`{self.run.train}`"))
        if self.run.top1 is not None:
            rows.append(("Held-out top-1", f"{100 * self.run.top1:.2f} % on `{self.run.val}`"))
        return "| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows)

    def _training(self) -> str:
        run = self.run
        names = ", ".join(f"{name} ({line})" if line else name for name, line in run.methods) or "none"
        lines = ["Trained with EffTrain-DS on DeepSpeed.", "", f"- Methods: {names}"]
        if run.relative_cost is not None:
            budget = f" of {run.epochs:g} dense epochs" if run.epochs is not None else " of dense training"
            passes = f"; {run.data_epochs:.1f} passes over the data" if run.data_epochs is not None else ""
            lines.append(f"- Cost of the whole run as planned: x{run.relative_cost:.2f}{budget}{passes}")
        if run.seconds:
            ranks = f" on {run.ranks} rank{'s' if run.ranks != 1 else ''}" if run.ranks else ""
            lines.append(f"- Training time up to this step: {duration_text(run.seconds)}{ranks}")
        if self.pretrained:
            lines.append(f"- Started from timm's weights of `{self.model}`")
        if run.versions:
            lines.append("- " + ", ".join(f"{name} {version}" for name, version in run.versions.items()))
        return "\n".join(lines) + "\n"

    def _use(self) -> str:
        arguments = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        ours = "import efftrain_ds.models.cswin  # timm has no CSWin\n" if self.model.startswith("cswin_") else ""
        text = (
            f"```python\n{ours}import timm\n\n"
            '# this folder, or "hf-hub:<owner>/<name>" once it is on a hub\n'
            'model = timm.create_model("local-dir:.", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))\n\n"
            "# the same by hand\n"
            f'model = timm.create_model("{self.model}"{arguments})\n'
            'timm.models.load_checkpoint(model, "model.safetensors")\n```\n'
        )
        if self.compact:
            text += (
                "\nWithout the heads and neurons that are zero, with `pip install efftrain-ds`:\n\n"
                "```python\nfrom efftrain_ds.export.compact import load_compact\n\n"
                'model = load_compact(".")  # compact.json and compact.safetensors\n```\n'
            )
        if self.onnx:
            text += "\n`model.onnx` takes `images` [batch, channels, height, width] and gives `logits`.\n"
        return text

    def _licence(self) -> str:
        source = f" The weights it started from (`{self.model}` of timm) have their own." if self.pretrained else ""
        bundled = (
            " The bundled images are part of Fashion-MNIST (MIT licence)."
            if (self.run.train or "").startswith("bundled:fashion_mnist")
            else ""
        )
        return (
            "No licence has been chosen for these weights yet: add `license:` to the head of this file before "
            f"publishing them, and mind that of the training data.{bundled}{source}\n"
        )


_FRONT = """---
tags:
- image-classification
- timm
- efftrain-ds
pipeline_tag: image-classification
library_name: timm
---
"""
