"""From the DeepSpeed JSON to validated configurations, and what is left for DeepSpeed."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ..core.compose import compose
from ..core.errors import ConfigError
from ..core.method import Method
from ..core.registry import get_method, import_plugins, method_names
from ..core.strict import StrictModel
from ..methods.builtin import register_builtin_methods
from .deepspeed_keys import check_deepspeed
from .describe import show
from .explain import explain
from .issues import ConfigIssues, Issue, close_hint, table, validate_command
from .jsonfile import read_json
from .overrides import apply_overrides
from .sections import EffTrainConfig

SECTION = "efftrain"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConfig:
    """One configuration file, validated and taken apart.

    Attributes:
        efftrain: the "efftrain" section; its `methods` hold the raw values.
        methods: validated configuration of each method that is on, by name, in file order.
        deepspeed: DeepSpeed's configuration: a deep copy without the "efftrain" key.
        path: the file, or None for a dictionary.
        warnings: what is allowed but probably not meant.
    """

    efftrain: EffTrainConfig
    methods: dict[str, StrictModel]
    deepspeed: dict[str, Any]
    path: Path | None = None
    warnings: tuple[Issue, ...] = field(default=(), compare=False)

    def resolved(self) -> dict[str, Any]:
        """The whole file as plain JSON values with every default of the "efftrain" section filled in.

        Loading the result gives the same configuration again.
        """
        section = self.efftrain.model_dump(mode="json", by_alias=True)
        section["methods"] = {
            name: config.model_dump(mode="json", by_alias=True) for name, config in self.methods.items()
        }
        return {**copy.deepcopy(self.deepspeed), SECTION: section}


def build_methods(config: LoadedConfig) -> list[Method]:
    """Instances of the configured methods, in run order.

    Raises:
        ConfigError: methods that cannot run together, one that needs the average of the weights where none is kept, or
            one that clips gradients beside DeepSpeed.
    """
    methods = compose([get_method(name)(settings) for name, settings in config.methods.items()])
    clipping = config.deepspeed.get("gradient_clipping", 1.0) if config.deepspeed else 0.0  # 1.0 is DeepSpeed's default
    clips = [method.clips_gradients for method in methods if method.clips_gradients]
    if clips and clipping:
        found = f"{clipping:g}" if "gradient_clipping" in config.deepspeed else "not given, which means 1.0"
        raise ConfigError(
            f'gradient_clipping: {found}, but {clips[0]} clips gradients, too; write "gradient_clipping": 0.0, or null '
            "there"
        )
    if config.efftrain.model.ema is None:
        missing = [f"{SECTION}.methods.{method.name}" for method in methods if method.needs_average]
        if missing:
            raise ConfigError(
                f"{SECTION}.model.ema: null, but {', '.join(missing)} needs the average of the weights; "
                f'set {SECTION}.model.ema, e.g. {{"decay": 0.998}}'
            )
    return methods


def load_config(
    source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), world: int | None = None
) -> LoadedConfig:
    """Read, check and split a DeepSpeed configuration with an optional "efftrain" section.

    Built-in methods are registered and the modules in "plugins" are imported on the way. Warnings are logged on rank 0.

    Args:
        source: path of a JSON file, or the dictionary that would go to ``deepspeed.initialize`` (or only its "efftrain"
            part); it is not changed.
        overrides: texts "path=value", applied first; see `config.overrides`.
        world: number of data-parallel ranks where it is known; the batch sizes are checked against it.

    Raises:
        ConfigError: everything that is wrong, in one text.
    """
    loaded = check_config(source, overrides=overrides, world=world)
    if loaded.warnings and os.environ.get("RANK", "0") == "0":
        logger.warning("efftrain config: %s\n%s", loaded.path or "the dictionary", table(loaded.warnings))
    return loaded


def check_config(
    source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), world: int | None = None
) -> LoadedConfig:
    """`load_config` without logging.

    Raises:
        ConfigIssues: a `ConfigError` with the single issues, where the text could be read at all.
        ConfigError: the file cannot be read, or an override is wrong.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    raw, duplicates = (source, []) if path is None else read_json(path)
    if not isinstance(raw, Mapping):
        raise ConfigError(f"efftrain config: {path} holds {show(raw)}, allowed: an object of DeepSpeed's keys")
    deepspeed = apply_overrides(raw, overrides)
    section = deepspeed.pop(SECTION, {})

    errors = [Issue(key, "given more than once; keep one") for key in duplicates]
    efftrain, issues = _check_section(section)
    methods, method_issues = _check_methods(section)
    errors += issues + method_issues
    warnings: list[Issue] = []
    if deepspeed or path is not None:  # a dictionary may hold our section only, e.g. for an engine that exists already
        deepspeed_errors, warnings = check_deepspeed(deepspeed, world)
        errors += deepspeed_errors
    if errors:
        command = validate_command(path, overrides, world) if path is not None else ""
        raise ConfigIssues(errors, str(path) if path is not None else "the dictionary", command)
    assert efftrain is not None
    return LoadedConfig(efftrain, methods, deepspeed, path, tuple(warnings))


def _validate(model: type[StrictModel], raw: Any, prefix: str) -> tuple[StrictModel | None, list[Issue]]:
    """Validate as JSON: only there does a strict model take a list for a tuple."""
    try:
        text = json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError) as error:
        return None, [Issue(prefix, f"cannot be written as JSON: {error}")]
    try:
        return model.model_validate_json(text), []
    except ValidationError as error:
        return None, explain(error, model, json.loads(text), prefix)


def _check_section(section: Any) -> tuple[EffTrainConfig | None, list[Issue]]:
    config, issues = _validate(EffTrainConfig, section, SECTION)
    return cast("EffTrainConfig | None", config), issues


def _check_methods(section: Any) -> tuple[dict[str, StrictModel], list[Issue]]:
    """Validate every method's own configuration and check that the methods fit together.

    Works on the raw section, so that a mistake elsewhere in it does not hide the mistakes here. Values of the wrong
    shape (plugins that are not a list, methods that are not an object) are reported by the section's own check.
    """
    register_builtin_methods()
    section = section if isinstance(section, Mapping) else {}
    issues: list[Issue] = []
    plugins = section.get("plugins")
    for plugin in plugins if isinstance(plugins, list) else []:
        if isinstance(plugin, str):
            try:
                import_plugins([plugin])
            except ConfigError as error:
                issues.append(Issue(f"{SECTION}.plugins", str(error).removeprefix(f"{SECTION}.plugins: ")))
    raw = section.get("methods")
    classes: list[type[Method]] = []
    methods: dict[str, StrictModel] = {}
    for name, value in (raw if isinstance(raw, Mapping) else {}).items():
        key = f"{SECTION}.methods.{name}"
        if name not in method_names():
            hint = close_hint(name, method_names())
            issues.append(Issue(key, f"unknown method.{hint} Registered: {', '.join(method_names()) or 'none'}"))
            continue
        classes.append(get_method(name))
        config, wrong = _validate(get_method(name).Config, value, key)
        issues += wrong
        if config is not None:
            methods[name] = config
    try:
        compose(cast("list[Method]", classes))  # looks at class attributes only, so no method is constructed here
    except ConfigError as error:
        for line in str(error).splitlines():
            key, _, text = line.partition(" ")
            issues.append(Issue(key.rstrip(":"), text))
    return methods, issues
