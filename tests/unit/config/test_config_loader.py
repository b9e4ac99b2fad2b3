from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds.config import EffTrainConfig, load_config
from efftrain_ds.config.issues import ConfigIssues
from efftrain_ds.config.loader import check_config
from efftrain_ds.core.errors import ConfigError
from efftrain_ds.core.registry import get_method, method_names, unregister_method
from efftrain_ds.methods import builtin
from efftrain_ds.methods.builtin import BUILTIN_MODULES  # as it is before the tests of this folder empty it

BASE = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


def test_no_section_gives_defaults_and_no_methods() -> None:
    loaded = load_config(BASE)
    assert loaded.efftrain == EffTrainConfig()
    assert loaded.methods == {}
    assert loaded.deepspeed == BASE
    assert loaded.path is None
    assert loaded.warnings == ()


def test_section_is_taken_out_of_a_deep_copy(methods: Any) -> None:
    source = {**BASE, "efftrain": {"run": {"epochs": 3}, "methods": {"test_thin": {"density": 0.25}}}}
    before = copy.deepcopy(source)
    loaded = load_config(source)
    assert "efftrain" not in loaded.deepspeed
    loaded.deepspeed["zero_optimization"]["stage"] = 3
    assert source == before
    assert loaded.efftrain.run.epochs == 3
    assert isinstance(loaded.methods["test_thin"], methods.ThinConfig)
    assert loaded.methods["test_thin"].density == 0.25


def test_lists_become_tuples_and_models(methods: Any) -> None:
    section = {
        "data": {"scale": [0.2, 1]},
        "methods": {"test_thin": {"heads": [3, 4]}, "test_curve": {"schedule": [{"until": 1, "bandwidth": 96}]}},
    }
    loaded = load_config({**BASE, "efftrain": section})
    assert loaded.efftrain.data.scale == (0.2, 1.0)
    assert loaded.methods["test_thin"].heads == (3, 4)
    assert loaded.methods["test_curve"].schedule == [methods.StageConfig(until=1, bandwidth=96)]
    assert list(loaded.methods) == ["test_thin", "test_curve"]


def test_python_tuples_in_a_dictionary_are_lists() -> None:
    assert load_config({**BASE, "efftrain": {"data": {"scale": (0.5, 1.0)}}}).efftrain.data.scale == (0.5, 1.0)


def test_section_alone_needs_no_batch_size_in_a_dictionary() -> None:
    assert load_config({}).deepspeed == {}
    assert load_config({"efftrain": {"run": {"steps": 3}}}, world=2).efftrain.run.steps == 3


def test_a_file_without_batch_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"efftrain": {}}')
    with pytest.raises(ConfigError, match="train_batch_size   missing"):
        load_config(tmp_path / "a.json")


def test_file_as_text_or_path(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**BASE, "efftrain": {"schema": 1}}))
    assert load_config(path) == load_config(str(path))
    assert load_config(str(path)).path == path


def test_resolved_is_json_with_every_default_and_loads_again(methods: Any) -> None:
    section = {"model": {"ema": {}}, "methods": {"test_thin": {"update_every": "5%"}, "test_curve": {}}}
    loaded = load_config({**BASE, "efftrain": section})
    resolved = json.loads(json.dumps(loaded.resolved(), allow_nan=False))
    assert resolved == loaded.resolved()
    assert resolved["efftrain"]["schema"] == 1
    assert resolved["efftrain"]["data"]["scale"] == [0.08, 1.0]
    assert resolved["efftrain"]["model"]["ema"] == {"decay": 0.9999, "warmup": True}
    assert resolved["efftrain"]["methods"]["test_curve"] == {"schedule": "et++", "stages": []}
    assert resolved["efftrain"]["methods"]["test_thin"]["update_every"] == "5%"
    assert {key: value for key, value in resolved.items() if key != "efftrain"} == BASE
    again = load_config(resolved)
    assert again.resolved() == resolved
    assert again.methods == loaded.methods
    resolved["zero_optimization"]["stage"] = 3
    loaded.resolved()["zero_optimization"]["stage"] = 2
    assert loaded.deepspeed["zero_optimization"]["stage"] == 1


def test_overrides_come_before_validation(methods: Any) -> None:
    source = {**BASE, "efftrain": {"run": {"seed": "wrong"}}}
    overrides = ["efftrain.run.seed=7", "efftrain.methods.test_thin.density=0.25", "train_batch_size=8"]
    loaded = load_config(source, overrides=overrides)
    assert loaded.efftrain.run.seed == 7
    assert loaded.methods["test_thin"].density == 0.25
    assert loaded.deepspeed["train_batch_size"] == 8
    with pytest.raises(ConfigError, match='efftrain.run.sede   unknown key. Did you mean "seed"'):
        load_config(BASE, overrides=["efftrain.run.sede=7"])


def test_world_is_checked() -> None:
    load_config(BASE, world=2)
    with pytest.raises(ConfigError, match="4 is not a multiple of world 3"):
        load_config(BASE, world=3)


def test_issues_are_kept_apart() -> None:
    with pytest.raises(ConfigIssues) as caught:
        check_config({**BASE, "efftrain": {"run": {"seed": -1}, "zz": 1}})
    assert [issue.key for issue in caught.value.issues] == ["efftrain.run.seed", "efftrain.zz"]


def test_warnings_are_logged_on_rank_0_only(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"train_batch_size": 4, "notes": 1}
    monkeypatch.delenv("RANK", raising=False)
    with caplog.at_level(logging.WARNING):
        loaded = load_config(source)
        assert caplog.messages == [
            "efftrain config: the dictionary\n"
            "  notes               not a key of DeepSpeed, which ignores it\n"
            "  gradient_clipping   not given, so DeepSpeed clips to norm 1.0; write 0.0 for no clipping"
        ]
        assert [issue.key for issue in loaded.warnings] == ["notes", "gradient_clipping"]
        caplog.clear()
        check_config(source)
        monkeypatch.setenv("RANK", "1")
        load_config(source)
        assert caplog.messages == []


def test_plugins_register_methods_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_method_for_test.py").write_text(
        "from efftrain_ds.core.method import Method\n"
        "from efftrain_ds.core.registry import register_method\n"
        "@register_method\n"
        "class Outside(Method):\n"
        "    name = 'test_outside'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = {"plugins": ["outside_method_for_test"], "methods": {"test_outside": {}}}
    try:
        loaded = load_config({**BASE, "efftrain": section})
        assert list(loaded.methods) == ["test_outside"]
        assert get_method("test_outside").__name__ == "Outside"
    finally:
        unregister_method("test_outside")
        sys.modules.pop("outside_method_for_test", None)


def test_builtin_modules_that_are_absent_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builtin_for_test").mkdir()
    (tmp_path / "builtin_for_test" / "__init__.py").write_text("")
    (tmp_path / "builtin_for_test" / "method.py").write_text(
        "from efftrain_ds.core.method import Method\n"
        "from efftrain_ds.core.registry import register_method\n"
        "@register_method\n"
        "class Present(Method):\n"
        "    name = 'test_present'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("builtin_for_test.method", "builtin_for_test.absent", "no_such_package_xyz.method")
    monkeypatch.setattr(builtin, "BUILTIN_MODULES", names)
    try:
        builtin.register_builtin_methods()
        assert "test_present" in method_names()
    finally:
        unregister_method("test_present")
        sys.modules.pop("builtin_for_test.method", None)
        sys.modules.pop("builtin_for_test", None)


def test_the_real_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "BUILTIN_MODULES", BUILTIN_MODULES)
    loaded = load_config(BASE, overrides=["efftrain.methods.efficienttrain.schedule=et"])
    assert loaded.methods["efficienttrain"].schedule == "et"
    with pytest.raises(ConfigIssues) as caught:
        load_config(BASE, overrides=["efftrain.methods.efficienttrain.schedule=et+"])
    (issue,) = caught.value.issues
    assert issue.key == "efftrain.methods.efficienttrain.schedule"
    assert issue.text.startswith('found "et+", allowed: "et", "et++"')
    assert issue.text.endswith(", or a list of stages")
