"""The JSON Schema and the generated documentation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from efftrain_ds.config.deepspeed_keys import KNOWN_KEYS
from efftrain_ds.config.explain import explain
from efftrain_ds.config.schema import json_schema
from efftrain_ds.config.sections import EffTrainConfig
from efftrain_ds.core.method import Method
from efftrain_ds.core.registry import register_method, unregister_method
from efftrain_ds.core.strict import StrictModel
from efftrain_ds.methods import builtin
from efftrain_ds.methods.builtin import BUILTIN_MODULES  # as it is before the tests of this folder empty it

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "make_config_docs.py"


def resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config_docs", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL.parent))  # as for a script
        spec.loader.exec_module(module)
    return module


def test_schema_of_the_whole_file(methods: Any) -> None:
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    assert schema["additionalProperties"] is True
    assert set(KNOWN_KEYS) < set(schema["properties"])
    assert schema["properties"]["train_batch_size"]["type"] == "integer"
    assert schema["properties"]["amp"]["not"] == {}
    section = resolve(schema, schema["properties"]["efftrain"])
    assert section["additionalProperties"] is False
    assert set(section["properties"]) == {
        "schema", "plugins", "run", "model", "data", "optim", "methods", "checkpoint", "observe", "guard",
    }  # fmt: skip
    run = resolve(schema, section["properties"]["run"])
    assert run["additionalProperties"] is False
    assert run["properties"]["seed"]["description"] == "Seed of every decision, sample order and augmentation."
    assert run["properties"]["seed"]["minimum"] == 0
    table = section["properties"]["methods"]
    assert table["additionalProperties"] is False
    assert {"test_curve", "test_thin", "test_rival"} <= set(table["properties"])
    thin = resolve(schema, table["properties"]["test_thin"])
    assert thin["properties"]["density"] == {
        "default": 0.5,
        "description": "Kept share.",
        "maximum": 1,
        "minimum": 0,
        "title": "Density",
        "type": "number",
    }
    assert thin["additionalProperties"] is False


def test_every_reference_of_the_schema_resolves(methods: Any) -> None:
    schema = json_schema()

    def walk(node: Any) -> int:
        if isinstance(node, dict):
            if "$ref" in node:
                assert resolve(schema, node)
            return ("$ref" in node) + sum(walk(child) for child in node.values())
        return sum(walk(child) for child in node) if isinstance(node, list) else 0

    assert walk(schema) > 10


def test_models_of_one_name_do_not_clash(methods: Any) -> None:
    class StageConfig(StrictModel):
        other: int = 3
        """Another stage."""

    class OtherConfig(StrictModel):
        stages: list[StageConfig] = []

    OtherConfig.model_rebuild(_types_namespace={"StageConfig": StageConfig})

    class Other(Method):
        name = "test_other"
        Config = OtherConfig

    register_method(Other)
    try:
        schema = json_schema()
    finally:
        unregister_method("test_other")
    table = resolve(schema, schema["properties"]["efftrain"])["properties"]["methods"]["properties"]
    ours = resolve(schema, resolve(schema, table["test_other"])["properties"]["stages"]["items"])
    theirs = resolve(schema, resolve(schema, table["test_curve"])["properties"]["stages"]["items"])
    assert set(ours["properties"]) == {"other"}
    assert set(theirs["properties"]) == {"until", "bandwidth"}


def test_docs_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(builtin, "BUILTIN_MODULES", BUILTIN_MODULES)
    assert load_tool().main(["--check"]) == 0, capsys.readouterr().err


def test_check_finds_a_stale_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool()
    page = tmp_path / "docs" / "config.md"
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert tool.main(["--out", str(page)]) == 0
    assert tool.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text() + "x")
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert "is stale: run python tools/make_config_docs.py" in capsys.readouterr().err


def test_docs_name_every_key(methods: Any) -> None:
    tool = load_tool()
    text = tool.render()
    assert text.isascii()
    for name, field in EffTrainConfig.model_fields.items():
        assert f"| `{field.alias or name}` |" in text
    assert "### `efftrain.data`" in text
    assert "| `flip` | a number from 0 to 1 | `0.5` | Probability of a horizontal flip. |" in text
    assert "#### `efftrain.model.ema`" in text
    nested = "\n".join(tool.section("efftrain.methods.x", methods.CurveConfig, 3))
    assert "#### `efftrain.methods.x.schedule[]`" in nested
    assert '| `schedule` | "et", "et++", or a list of stages | `"et++"` | Name or stages. |' in nested
    assert "| `bandwidth` | a whole number > 0 | required | Side of the crop. |" in nested


def test_example_of_the_docs_is_valid() -> None:
    tool = load_tool()
    example = json.loads(tool.EXAMPLE)
    section = example.pop("efftrain")
    assert list(section.pop("methods")) == ["efficienttrain"]
    EffTrainConfig.model_validate_json(json.dumps(section))
    from efftrain_ds.config.deepspeed_keys import check_deepspeed

    assert check_deepspeed(example, world=8) == ([], [])


def test_explain_is_usable_alone(methods: Any) -> None:
    from pydantic import ValidationError

    raw = {"density": 2}
    with pytest.raises(ValidationError) as caught:
        methods.ThinConfig.model_validate(raw)
    (issue,) = explain(caught.value, methods.ThinConfig, raw, "")
    assert (issue.key, issue.text) == ("density", "found 2, allowed: a number from 0 to 1")
