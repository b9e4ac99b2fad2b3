from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from efftrain_ds.cli import main as cli
from efftrain_ds.cli.args import add_config_arguments
from efftrain_ds.core.errors import DivergenceError, PlanError
from efftrain_ds.methods import builtin

GOOD = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "efftrain": {}}


@pytest.fixture(autouse=True)
def _no_builtin_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "BUILTIN_MODULES", ())


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    def write(**changes: Any) -> str:
        path = tmp_path / "a.json"
        path.write_text(json.dumps({**GOOD, **changes}))
        return str(path)

    return write


def fake_verb(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    module = types.ModuleType("efftrain_ds.cli.fake")

    def add_parser(subparsers: Any) -> None:
        subparsers.add_parser("fake").set_defaults(func=action)

    module.add_parser = add_parser  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "efftrain_ds.cli.fake", module)
    monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, ("fake", "for the tests")))


def raiser(error: BaseException) -> Any:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_help_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, text in cli.VERBS:
        assert name in out
        assert text in out
    assert cli.main([]) == 2
    assert "validate" in capsys.readouterr().err


def test_unknown_verb_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["nonsense"]) == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    assert cli.main(["validate"]) == 2
    assert "FILE" in capsys.readouterr().err
    assert cli.main(["validate", "--help"]) == 0
    assert "--world" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, _ in cli.VERBS])
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"efftrain {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("result", "code"), [(0, 0), (None, 0), (5, 5)])
def test_exit_code_of_a_verb(monkeypatch: pytest.MonkeyPatch, result: Any, code: int) -> None:
    fake_verb(monkeypatch, lambda args: result)
    assert cli.main(["fake"]) == code


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PlanError("no room"), 3, "no room\n"),
        (DivergenceError("nan"), 76, "nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_text_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    fake_verb(monkeypatch, raiser(error))
    assert cli.main(["fake"]) == code
    captured = capsys.readouterr()
    assert captured.err == text
    assert captured.out == ""


def test_unexpected_exceptions_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_verb(monkeypatch, raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from efftrain_ds.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'deepspeed', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: efftrain")


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "efftrain_ds.cli.main", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


# validate


def test_validate_good_file(config_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file()
    assert cli.main(["validate", path, "--world", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == (
        f"OK  {path}\nOK  methods: none\nOK  batch: 8 = 2 x 2 x 2 (micro-batch x accumulation x world)\n"
    )
    assert captured.err == ""
    assert cli.main(["validate", path]) == 0
    assert capsys.readouterr().out.splitlines()[2] == (
        "OK  batch: train_batch_size 8, train_micro_batch_size_per_gpu 2 (give --world to check the product)"
    )


def test_validate_shows_warnings_once(config_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", config_file(notes=1)]) == 0
    assert capsys.readouterr().err == "1 warning\n  notes   not a key of DeepSpeed, which ignores it\n"


def test_validate_bad_file(config_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(efftrain={"run": {"sede": 1}}, amp={})
    assert cli.main(["validate", path, "--set", "efftrain.optim.min_lr=-1", "--world", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"efftrain config: 4 errors in {path}\n"
        '  efftrain.run.sede       unknown key. Did you mean "seed"?\n'
        "  efftrain.optim.min_lr   found -1, allowed: a number >= 0\n"
        "  amp                     removed from DeepSpeed, which refuses the key. "
        'Use "bf16", "fp16" or "torch_autocast"\n'
        "  train_batch_size        8 is not a multiple of train_micro_batch_size_per_gpu 2 x world 3\n"
        f"Nothing was started. Check again with: efftrain validate {path} --set efftrain.optim.min_lr=-1 --world 3\n"
    )


def test_validate_json(config_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(notes=1)
    assert cli.main(["validate", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "file": path,
        "errors": [],
        "warnings": [{"key": "notes", "text": "not a key of DeepSpeed, which ignores it"}],
    }
    assert cli.main(["validate", path, "--json", "--set", "efftrain.run.seed=-1"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert result["errors"] == [{"key": "efftrain.run.seed", "text": "found -1, allowed: a whole number >= 0"}]
    assert cli.main(["validate", path + "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["errors"][0]["text"].startswith("efftrain config: no such file")


def test_validate_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "no/such.json"]) == 2
    assert capsys.readouterr().err == "efftrain config: no such file: no/such.json\n"


# schema


def test_schema_to_screen_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "efftrain" in schema["properties"]
    out = tmp_path / "s.json"
    assert cli.main(["schema", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == schema
    assert capsys.readouterr().out == f"{out}: JSON Schema written\n"
    assert cli.main(["schema", "--out", str(tmp_path / "no" / "s.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert cli.main(["schema", "--plugin", "no_such_package_xyz"]) == 2
    assert "no_such_package_xyz" in capsys.readouterr().err


# shared arguments


@pytest.mark.parametrize("flag", ["--ds_config", "--deepspeed_config"])
def test_config_arguments(flag: str) -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args([flag, "a.json", "--set", "a=1", "--set", "b.c=x"])
    assert args.ds_config == "a.json"
    assert args.overrides == ["a=1", "b.c=x"]
    assert parser.parse_args([flag, "a.json"]).overrides == []
    with pytest.raises(SystemExit):
        parser.parse_args([])
