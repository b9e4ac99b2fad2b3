"""JSON Schema of the whole file, for completion and checking in editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from ..core.registry import get_method, method_names
from ..methods.builtin import register_builtin_methods
from .deepspeed_keys import ACCUMULATION, BATCH, KNOWN_KEYS, MICRO, REMOVED_KEYS
from .sections import EffTrainConfig

_DEEPSPEED = "DeepSpeed's own key: see https://www.deepspeed.ai/docs/config-json/"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a DeepSpeed configuration with an "efftrain" section.

    DeepSpeed's keys are named but open; the "efftrain" section is strict, with one property for each registered
    method. Descriptions come from the docstrings of the configuration models.
    """
    register_builtin_methods()
    configs = {name: get_method(name).Config for name in method_names()}
    models = list(dict.fromkeys([EffTrainConfig, *configs.values()]))
    references, definitions = models_json_schema([(model, "validation") for model in models])
    definitions = definitions["$defs"]

    def reference(model: type) -> dict[str, Any]:
        return references[(model, "validation")]

    section = definitions[reference(EffTrainConfig)["$ref"].rpartition("/")[2]]
    methods = section["properties"]["methods"]
    methods["properties"] = {name: reference(config) for name, config in configs.items()}
    methods["additionalProperties"] = False

    batch = {"type": "integer", "minimum": 1, "description": _DEEPSPEED}
    properties: dict[str, Any] = {
        key: batch if key in (BATCH, MICRO, ACCUMULATION) else {"description": _DEEPSPEED} for key in KNOWN_KEYS
    }
    properties |= {
        key: {"not": {}, "description": f"Removed from DeepSpeed. {hint}".strip()} for key, hint in REMOVED_KEYS.items()
    }
    properties["efftrain"] = reference(EffTrainConfig)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeepSpeed configuration with an efftrain section",
        "type": "object",
        "properties": properties,
        "additionalProperties": True,
        "$defs": definitions,
    }
