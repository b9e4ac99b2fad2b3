#!/usr/bin/env python3
"""Write docs/config.md from the configuration models: a table for each section and each method.

With ``--check`` nothing is written; the exit code is 1 when the file on disk is not what would be written.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from generated_page import run
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from efftrain_ds.config.describe import describe, field_type, is_model, show, union_members, unwrap, without_null
from efftrain_ds.config.sections import EffTrainConfig
from efftrain_ds.core.registry import get_method, method_names
from efftrain_ds.methods.builtin import register_builtin_methods

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "config.md"

HEAD = """\
<!-- Made by tools/make_config_docs.py from the configuration models; do not edit by hand. -->

# Configuration

One JSON file configures a run. DeepSpeed's keys (batch sizes, ZeRO, precision, clipping, optimizer) stand where
DeepSpeed has them; everything of EffTrain-DS stands under `"efftrain"` and is taken out before DeepSpeed sees the file.

```json
{example}
```

- A method is on when its key stands under `"methods"`; `{{}}` takes all of its defaults.
- Unknown keys, wrong types and values out of range are errors. `efftrain validate FILE` shows all of them at once.
- Typos in DeepSpeed's own keys, which DeepSpeed would ignore, are errors too; so are batch sizes that do not multiply.
- A duration is a string with a unit: `"500st"` (optimizer steps), `"2ep"` (epochs), `"10%"` (of the budget),
  `"30min"`.
- `--set path=value` changes one key on the command line: `--set efftrain.run.epochs=100`. The value is read as JSON,
  and as a string where it is not JSON.
- `efftrain schema --out efftrain.schema.json` writes a JSON Schema; with `"$schema": "efftrain.schema.json"` at the top
  of the file, an editor completes and checks the keys.
"""

EXAMPLE = """\
{
  "train_batch_size": 1024,
  "train_micro_batch_size_per_gpu": 128,
  "gradient_clipping": 1.0,
  "bf16": {"enabled": true},
  "zero_optimization": {"stage": 2},
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05}},
  "efftrain": {
    "schema": 1,
    "run": {"epochs": 200, "output": "runs/first"},
    "model": {"name": "deit_small_patch16_224"},
    "data": {"train": "shards/train", "val": "shards/val"},
    "methods": {"efficienttrain": {}}
  }
}"""


def nested_models(tp: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model inside a type, with what stands after the key: "" for the value itself, "[]" for list elements."""
    base, _ = unwrap(without_null(tp))
    if is_model(base):
        yield "", base
        return
    members = union_members(base) or [arg for arg in get_args(base) if arg is not Ellipsis]
    suffix = "" if union_members(base) else "[]"
    seen = set()
    for member in members:
        for inner, model in nested_models(member):
            if model not in seen:
                seen.add(model)
                yield suffix + inner, model


def default_text(field: FieldInfo) -> str:
    """The default as it would be written in the file."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{show(value, limit=80)}`"


def rows(model: type[BaseModel]) -> list[str]:
    """The table of one model's keys."""
    lines = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        cells = [f"`{field.alias or name}`", describe(field_type(field)), default_text(field), meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def section(path: str, model: type[BaseModel], level: int) -> list[str]:
    """Heading, introduction and table of one model, and the same for the models inside it."""
    lines = [f"{'#' * level} `{path}`", ""]
    intro = inspect.getdoc(model) if model.__doc__ else ""
    if intro:
        lines += [intro, ""]
    if model.model_fields:
        lines += [*rows(model), ""]
    else:
        lines += ["This object has no keys.", ""]
    for name, field in model.model_fields.items():
        for suffix, inner in nested_models(field_type(field)):
            lines += section(f"{path}.{field.alias or name}{suffix}", inner, level + 1)
    return lines


def root_rows() -> list[str]:
    """The table of the keys of "efftrain" itself; sections are introduced by their own docstrings."""
    lines = ["| Key | Value | Meaning |", "|---|---|---|"]
    for name, field in EffTrainConfig.model_fields.items():
        key = field.alias or name
        models = list(nested_models(field_type(field)))
        meaning = inspect.getdoc(models[0][1]).splitlines()[0] if models else field.description or ""
        lines.append(f"| `{key}` | {describe(field_type(field))} | {meaning} |")
    return lines


def render() -> str:
    """The whole page."""
    register_builtin_methods()
    lines = [HEAD.format(example=EXAMPLE), "## `efftrain`", "", *root_rows(), ""]
    for name, field in EffTrainConfig.model_fields.items():
        for suffix, model in nested_models(field_type(field)):
            lines += section(f"efftrain.{field.alias or name}{suffix}", model, 3)
    lines += ["## Methods", ""]
    names = [name for name in method_names() if get_method(name).__module__.startswith("efftrain_ds.")]
    if not names:
        lines += ["None is installed.", ""]
    for name in names:
        lines += section(f"efftrain.methods.{name}", get_method(name).Config, 3)
    return "\n".join(lines).rstrip("\n") + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it with ``--check``."""
    return run(render, OUTPUT, "tools/make_config_docs.py", "Write docs/config.md from the configuration models.", argv)


if __name__ == "__main__":
    sys.exit(main())
