"""The exact text of every kind of configuration error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds.config.loader import load_config
from efftrain_ds.core.errors import ConfigError, EffTrainError
from efftrain_ds.core.registry import method_names
from efftrain_ds.methods.builtin import register_builtin_methods

BASE = {"train_batch_size": 4, "gradient_clipping": 1.0}


def error_text(section: Any = None, *, world: int | None = None, **deepspeed: Any) -> str:
    source = {**BASE, **deepspeed}
    if section is not None:
        source["efftrain"] = section
    with pytest.raises(ConfigError) as caught:
        load_config(source, world=world)
    return str(caught.value)


def error_lines(section: Any = None, *, world: int | None = None, **deepspeed: Any) -> list[tuple[str, str]]:
    lines = error_text(section, world=world, **deepspeed).splitlines()
    assert lines[0] == f"efftrain config: {len(lines) - 2} error{'s' * (len(lines) > 3)} in the dictionary"
    assert lines[-1] == "Nothing was started."
    return [tuple(line.strip().split("   ", 1)) for line in lines[1:-1] if line.startswith("  ")]


def one(section: Any = None, **deepspeed: Any) -> tuple[str, str]:
    lines = error_lines(section, **deepspeed)
    assert len(lines) == 1, lines
    return lines[0][0].strip(), lines[0][1].strip()


def registered() -> str:
    register_builtin_methods()
    return ", ".join(method_names())


def test_whole_text_of_two_errors_in_a_file(tmp_path: Path, methods: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds_configs").mkdir()
    section = {"methods": {"test_thin": {"densty": 0.6}, "test_curve": {"schedule": "et+"}}}
    Path("ds_configs/stack.json").write_text(json.dumps({**BASE, "efftrain": section}))
    with pytest.raises(ConfigError) as caught:
        load_config("ds_configs/stack.json")
    assert str(caught.value) == (
        "efftrain config: 2 errors in ds_configs/stack.json\n"
        '  efftrain.methods.test_thin.densty      unknown key. Did you mean "density"?\n'
        '  efftrain.methods.test_curve.schedule   found "et+", allowed: "et", "et++", or a list of stages\n'
        "Nothing was started. Check again with: efftrain validate ds_configs/stack.json"
    )
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, EffTrainError)


def test_one_error_is_singular() -> None:
    assert error_text({"run": {"seed": -1}}) == (
        "efftrain config: 1 error in the dictionary\n"
        "  efftrain.run.seed   found -1, allowed: a whole number >= 0\n"
        "Nothing was started."
    )


def test_command_repeats_the_options(tmp_path: Path) -> None:
    path = tmp_path / "my config.json"
    path.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides=["efftrain.run.seed=-1", "efftrain.run.output=a b"], world=2)
    command = str(caught.value).splitlines()[-1].partition("Check again with: ")[2]
    assert command == (
        f"efftrain validate '{path}' --set efftrain.run.seed=-1 --set 'efftrain.run.output=a b' --world 2"
    )


def test_everything_wrong_at_once(methods: Any) -> None:
    text = error_text(
        {
            "epochs": 3,
            "run": {"seed": -1},
            "data": {"flip": True, "interpolation": "nearest"},
            "methods": {"test_thin": {"density": 1.5}, "test_thim": {}},
        },
        amp={},
        gradient_clippingg=1,
        train_micro_batch_size_per_gpu=3,
        world=1,
    )
    assert text == (
        "efftrain config: 9 errors in the dictionary\n"
        "  efftrain.run.seed                    found -1, allowed: a whole number >= 0\n"
        '  efftrain.data.interpolation          found "nearest", allowed: "bicubic" or "bilinear"\n'
        "  efftrain.data.flip                   found true, allowed: a number from 0 to 1\n"
        '  efftrain.epochs                      unknown key. Did you mean "run.epochs"?\n'
        "  efftrain.methods.test_thin.density   found 1.5, allowed: a number from 0 to 1\n"
        f'  efftrain.methods.test_thim           unknown method. Did you mean "test_thin"? Registered: {registered()}\n'
        "  amp                                  removed from DeepSpeed, which refuses the key. "
        'Use "bf16", "fp16" or "torch_autocast"\n'
        "  gradient_clippingg                   unknown key, which DeepSpeed would ignore. "
        'Did you mean "gradient_clipping"?\n'
        "  train_batch_size                     4 is not a multiple of train_micro_batch_size_per_gpu 3 x world 1\n"
        "Nothing was started."
    )


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ({"run": {"sede": 1}}, "efftrain.run.sede", 'unknown key. Did you mean "seed"?'),
        ({"run": {"zzz": 1}}, "efftrain.run.zzz", "unknown key. Allowed: seed, epochs, steps, output, keep_old_state"),
        ({"warmup": "1ep"}, "efftrain.warmup", 'unknown key. Did you mean "optim.warmup"?'),
        (
            {"optimizer": {}},
            "efftrain.optimizer",
            "unknown key. It is DeepSpeed's: write it at the top level of the file",
        ),
        ({"run": {"seed": "3"}}, "efftrain.run.seed", 'found "3" (a string), allowed: a whole number >= 0'),
        ({"run": {"seed": 3.0}}, "efftrain.run.seed", "found 3.0 (a number), allowed: a whole number >= 0"),
        ({"run": {"seed": True}}, "efftrain.run.seed", "found true, allowed: a whole number >= 0"),
        ({"run": {"seed": None}}, "efftrain.run.seed", "found null, allowed: a whole number >= 0"),
        ({"run": {"output": 3}}, "efftrain.run.output", "found 3 (a whole number), allowed: a string"),
        ({"run": {"epochs": 0}}, "efftrain.run.epochs", "found 0, allowed: a number > 0 or null"),
        ({"run": {"epochs": 1, "steps": 2}}, "efftrain.run", 'give "epochs" or "steps", not both'),
        ({"run": []}, "efftrain.run", "found [] (a list), allowed: an object"),
        ({"model": {"ema": True}}, "efftrain.model.ema", "found true, allowed: an object or null"),
        ({"model": {"ema": {"decay": 1}}}, "efftrain.model.ema.decay", "found 1, allowed: a number >= 0 and < 1"),
        ({"model": {"pretrained": 1}}, "efftrain.model.pretrained", "found 1 (a whole number), allowed: true or false"),
        (
            {"model": {"name": "vit_base_patch16_224", "pretrained": True, "init": {"weights": "runs/a"}}},
            "efftrain.model",
            'pretrained and init do not go together; init.weights = "timm:vit_base_patch16_224" starts from timm\'s '
            "weights",
        ),
        ({"data": {"scale": 0.2}}, "efftrain.data.scale", "found 0.2 (a number), allowed: a list of 2 numbers"),
        ({"data": {"scale": [0.2]}}, "efftrain.data.scale", "found [0.2], allowed: a list of 2 numbers"),
        ({"data": {"scale": [0, 1, 2]}}, "efftrain.data.scale", "found [0, 1, 2], allowed: a list of 2 numbers"),
        ({"data": {"scale": [0, "a"]}}, "efftrain.data.scale[1]", 'found "a" (a string), allowed: a number'),
        ({"data": {"mean": [0, "a"]}}, "efftrain.data.mean[1]", 'found "a" (a string), allowed: a number'),
        ({"schema": 2}, "efftrain.schema", "found 2, allowed: 1"),
        ({"plugins": "mine"}, "efftrain.plugins", 'found "mine" (a string), allowed: a list of strings'),
        ({"plugins": [3]}, "efftrain.plugins[0]", "found 3 (a whole number), allowed: a string"),
        (
            {"optim": {"warmup": "20"}},
            "efftrain.optim.warmup",
            """a duration is a number with a unit ("500st", "2ep", "10%", "30min"), found '20'""",
        ),
        (
            {"optim": {"warmup": 20}},
            "efftrain.optim.warmup",
            'found 20 (a whole number), allowed: a duration in steps ("500st", "2ep", "10%")',
        ),
        (
            {"checkpoint": {"every": 20}},
            "efftrain.checkpoint.every",
            'found 20 (a whole number), allowed: a duration ("500st", "2ep", "10%", "30min") or null',
        ),
        (
            {"observe": {"eval_every": "30min"}},
            "efftrain.observe.eval_every",
            """only steps, epochs and percent are possible here ("500st", "2ep", "10%"), found '30min'""",
        ),
        (
            {"checkpoint": {"every": "soon"}},
            "efftrain.checkpoint.every",
            """a duration is a number with a unit ("500st", "2ep", "10%", "30min"), found 'soon'""",
        ),
        ([], "efftrain", "found [] (a list), allowed: an object"),
        ("x", "efftrain", 'found "x" (a string), allowed: an object'),
        ({"methods": []}, "efftrain.methods", "found [] (a list), allowed: an object"),
    ],
)
def test_section_errors(section: Any, key: str, text: str) -> None:
    assert one(section) == (key, text)


_DURATION = 'a duration ("500st", "2ep", "10%", "30min")'


@pytest.mark.parametrize(
    ("method", "config", "lines"),
    [
        ("test_thin", None, [("", "found null, allowed: an object")]),
        ("test_thin", True, [("", "found true, allowed: an object")]),
        ("test_thin", {"density": 1}, [("", '"limit" is needed when "density" is 1')]),
        ("test_thin", {"heads": [1]}, [(".heads", "found [1], allowed: a list of 2 whole numbers")]),
        ("test_thin", {"mode": "x"}, [(".mode", 'found "x", allowed: a whole number or "auto"')]),
        ("test_thin", {"mode": 1.5}, [(".mode", 'found 1.5 (a number), allowed: a whole number or "auto"')]),
        ("test_thin", {"mode": []}, [(".mode", 'found [] (a list), allowed: a whole number or "auto"')]),
        ("test_thin", {"share": 2}, [(".share", f"found 2, allowed: a number from 0 to 1, {_DURATION}, or null")]),
        (
            "test_thin",
            {"share": "2"},
            [(".share", """a duration is a number with a unit ("500st", "2ep", "10%", "30min"), found '2'""")],
        ),
        (
            "test_curve",
            {"schedule": 3},
            [(".schedule", 'found 3 (a whole number), allowed: "et", "et++", or a list of stages')],
        ),
        (
            "test_curve",
            {"schedule": {}},
            [(".schedule", 'found {} (an object), allowed: "et", "et++", or a list of stages')],
        ),
        (
            "test_curve",
            {"schedule": [{"until": 0.5, "bandwith": 96}, {"until": "a", "bandwidth": -1}]},
            [
                (".schedule[0].bandwidth", "missing, allowed: a whole number > 0"),
                (".schedule[0].bandwith", 'unknown key. Did you mean "bandwidth"?'),
                (".schedule[1].until", 'found "a" (a string), allowed: a number from 0 to 1'),
                (".schedule[1].bandwidth", "found -1, allowed: a whole number > 0"),
            ],
        ),
        ("test_curve", {"stages": [3]}, [(".stages[0]", "found 3 (a whole number), allowed: an object")]),
        ("test_curve", {"stages": [{"until": 0}]}, [(".stages[0].bandwidth", "missing, allowed: a whole number > 0")]),
        ("test_curve", {"stages": {}}, [(".stages", "found {} (an object), allowed: a list of stages")]),
    ],
)
def test_method_errors(methods: Any, method: str, config: Any, lines: list[tuple[str, str]]) -> None:
    expected = [(f"efftrain.methods.{method}{key}", text) for key, text in lines]
    found = [(key.strip(), text.strip()) for key, text in error_lines({"methods": {method: config}})]
    assert found == expected


def test_unknown_method_without_a_close_name(methods: Any) -> None:
    key, text = one({"methods": {"zz": {}}})
    assert (key, text) == ("efftrain.methods.zz", f"unknown method. Registered: {registered()}")


def test_methods_that_do_not_fit_together(methods: Any) -> None:
    lines = error_lines({"methods": {"test_rival": {}, "test_thin": {}}})
    assert [(key.strip(), text.strip()) for key, text in lines] == [
        ("efftrain.methods.test_rival", "cannot run together with test_thin"),
        ("efftrain.methods.test_rival", "needs test_curve, which is not configured"),
    ]


def test_plugin_that_cannot_be_imported() -> None:
    assert one({"plugins": ["no_such_package_xyz.a"]}) == (
        "efftrain.plugins",
        "cannot import \"no_such_package_xyz.a\": No module named 'no_such_package_xyz'",
    )


def test_values_that_json_cannot_hold() -> None:
    key, text = one({"run": {"epochs": float("nan")}})
    assert key == "efftrain"
    assert text.startswith("cannot be written as JSON: ")
    key, text = one({"run": {"output": Path("x")}})
    assert key == "efftrain"
    assert "PosixPath is not JSON serializable" in text


def test_long_values_are_cut() -> None:
    _, text = one({"run": {"seed": "x" * 300}})
    assert text == 'found "' + "x" * 55 + " ... (a string), allowed: a whole number >= 0"


# Files.


def file_error(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{}")
    assert file_error(tmp_path / "zz" / "a.json") == f"efftrain config: no such file: {tmp_path / 'zz' / 'a.json'}"
    assert file_error(tmp_path / "stck.json") == (
        f"efftrain config: no such file: {tmp_path / 'stck.json'}. Did you mean {tmp_path / 'stack.json'}?"
    )


def test_folder_and_binary_file(tmp_path: Path) -> None:
    assert file_error(tmp_path).startswith(f"efftrain config: cannot read {tmp_path}: ")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    assert file_error(tmp_path / "a.json").startswith(f"efftrain config: cannot read {tmp_path / 'a.json'}: ")


def test_not_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n  "train_batch_size": 4\n  "fp16": {}\n}')
    assert file_error(path) == (
        f"efftrain config: {path} is not JSON: line 3, column 3: Expecting ',' delimiter\n    \"fp16\": {{}}\n    ^"
    )
    path.write_text("")
    assert file_error(path).startswith(f"efftrain config: {path} is not JSON: line 1, column 1: Expecting value")
    path.write_text('{"a": NaN}')
    assert file_error(path) == f"efftrain config: {path} is not JSON: NaN is not a JSON value"
    path.write_text("[1]")
    assert file_error(path) == f"efftrain config: {path} holds [1], allowed: an object of DeepSpeed's keys"


def test_duplicate_keys_are_errors_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '{"train_batch_size": 4, "train_batch_size": 8, "optimizer": {"params": {"lr": 1, "lr": 2, "lr": 3}},'
        ' "x": [{"b": 1, "b": 2}], "gradient_clipping": 1, "efftrain": {"run": {"seed": 1, "seed": -2}}}'
    )
    assert file_error(path) == (
        f"efftrain config: 5 errors in {path}\n"
        "  train_batch_size      given more than once; keep one\n"
        "  optimizer.params.lr   given more than once; keep one\n"
        "  x[0].b                given more than once; keep one\n"
        "  efftrain.run.seed     given more than once; keep one\n"
        "  efftrain.run.seed     found -2, allowed: a whole number >= 0\n"
        f"Nothing was started. Check again with: efftrain validate {path}"
    )
