"""The layers of the package: who may import whom, read from the source of every module.

A module may import its own folder, every lower layer, and the folders that `EXTRA` grants. Nothing else.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "efftrain_ds"

LAYERS = {
    "core": 0,
    "models": 1,
    "data": 1,
    "zero": 1,
    "cost": 1,
    "observe": 1,
    "guards": 1,
    "checkpoint": 1,
    "methods": 2,
    "config": 3,
    "planning": 4,
    "embedded": 4,
    "checkpointing": 4,
    "lr_schedule": 4,
    "engine": 5,
    "startup": 6,
    "doctor": 6,
    "export": 6,
    "trainer": 7,  # and every train_*.py beside it
    "cli": 8,
}
"""Layer of each folder and of each module at the top of the package. Imports point to lower numbers only."""

EXTRA = {("checkpoint", "zero"), ("observe", "cost"), ("models", "zero"), ("guards", "zero")}
"""The only imports between folders of one layer: (from, to)."""

LEAF = "kernels"
"""Installed as efftrain_ds.kernels; every layer may import it, and it imports `KERNEL_IMPORTS` only."""

KERNEL_IMPORTS = {"torch", "triton", "numpy"}

DEEPSPEED_ANYTHING = {"efftrain_ds/zero/access.py"}
"""Files that may import DeepSpeed's submodules and private names."""

DEEPSPEED_PUBLIC_USE = re.compile(r"efftrain_ds/(startup|trainer|train_\w+|checkpoint/store)\.py")
"""Files that may ``import deepspeed`` and use its public top-level names and `DEEPSPEED_PUBLIC_MODULES`."""

DEEPSPEED_PUBLIC_MODULES = {"accelerator", "comm"}

MAX_LINES, MAX_TEST_LINES = 600, 800

Import = tuple[str, int]


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def kernel_files() -> list[Path]:
    return sorted((ROOT / LEAF).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == LEAF:
        parts = [PACKAGE, *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Absolute dotted names that the source imports anywhere (also inside functions), with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join(parts[:keep] + ([node.module] if node.module else []))
            else:
                base = node.module or ""
            for alias in node.names:  # `from .. import engine` imports the module efftrain_ds.engine
                yield f"{base}.{alias.name}", node.lineno


def unit_of(name: str) -> str | None:
    """Folder or top-level module of a dotted name of the package; None outside of it and for the package itself."""
    parts = name.split(".")
    if parts[0] != PACKAGE or len(parts) < 2:
        return None
    return "trainer" if parts[1].startswith("train_") else parts[1]


def layer_problems(source: str, module: str, is_package: bool = False) -> list[str]:
    unit = unit_of(module)
    if unit is None:
        return []
    if unit not in LAYERS:
        return [f"{module}: {unit} has no layer; give it one in tests/unit/test_imports.py"]
    problems = []
    for name, line in imports(source, module, is_package):
        target = unit_of(name)
        if name == f"{PACKAGE}.__version__":
            continue
        if name == PACKAGE or name.startswith(PACKAGE + ".") and target not in (*LAYERS, LEAF):
            problems.append(f"{module}:{line}: imports {name}, which has no layer")
        elif target is not None and target not in (LEAF, unit) and (unit, target) not in EXTRA:
            if LAYERS[target] >= LAYERS[unit]:
                problems.append(f"{module}:{line}: {unit} must not import {target} ({name})")
        own, other = module.split("."), name.split(".")
        method = unit == "methods" and len(own) > 2 and (is_package or len(own) > 3)  # inside a method's folder
        if method and target == "methods" and other[2:3] != own[2:3]:
            problems.append(f"{module}:{line}: the method {own[2]} must not import {name}")
    return problems


def kernel_problems(source: str, module: str, is_package: bool = False) -> list[str]:
    allowed = KERNEL_IMPORTS | set(sys.stdlib_module_names)
    return [
        f"{module}:{line}: kernels must not import {name}"
        for name, line in imports(source, module, is_package)
        if name.split(".")[0] not in allowed and not name.startswith(f"{PACKAGE}.{LEAF}")
    ]


def public_deepspeed_name(name: str) -> bool:
    """True for deepspeed, deepspeed.<public name> and what is inside `DEEPSPEED_PUBLIC_MODULES`."""
    parts = name.split(".")[1:]
    if any(part.startswith("_") and not part.startswith("__") for part in parts):
        return False
    return len(parts) < 2 or parts[0] in DEEPSPEED_PUBLIC_MODULES


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes, "" for other expressions."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def deepspeed_problems(source: str, path: str) -> list[str]:
    if path in DEEPSPEED_ANYTHING:
        return []
    imported = [name for name, _ in imports(source, "", False) if name.split(".")[0] == "deepspeed"]
    used = {dotted(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    used = {name for name in used if name.startswith("deepspeed.")} if "deepspeed" in imported else set()
    if imported and not DEEPSPEED_PUBLIC_USE.fullmatch(path):
        return [f"{path}: imports {name}; only zero/access.py and the engine touch DeepSpeed" for name in imported]
    return [
        f"{path}: {name} is not public; such names of DeepSpeed belong in zero/access.py"
        for name in sorted({*imported, *used})
        if not public_deepspeed_name(name)
    ]


def test_layers() -> None:
    files = package_files()
    assert len(files) > 20
    problems = []
    for path in files:
        problems += layer_problems(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_kernels_are_a_leaf() -> None:
    assert kernel_files()
    problems = []
    for path in kernel_files():
        problems += kernel_problems(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_private_deepspeed_names_stay_in_one_file() -> None:
    problems = []
    for path in package_files() + kernel_files():
        problems += deepspeed_problems(path.read_text(), path.relative_to(ROOT).as_posix())
    assert not problems, "\n".join(problems)


def test_module_length() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    limits = [(path, MAX_LINES) for path in package_files() + kernel_files()]
    limits += [(path, MAX_TEST_LINES) for path in tests]
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"
        for path, limit in limits
        if (lines := len(path.read_text().splitlines())) > limit
    ]
    assert not long, "\n".join(long)


# The rules themselves, on small sources.


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("efftrain_ds.core.a", "import torch, numpy"),
        ("efftrain_ds.core.a", "from .errors import ConfigError"),
        ("efftrain_ds.data.a", "from ..core.errors import ConfigError"),
        ("efftrain_ds.data.a", "from ..kernels.crop import op"),
        ("efftrain_ds.checkpoint.a", "from ..zero.access import x"),
        ("efftrain_ds.observe.a", "from ..cost.macs import x"),
        ("efftrain_ds.methods.svite.method", "from .config import C\nfrom ...models.surgery import grow"),
        ("efftrain_ds.config.a", "from ..methods.builtin import register_builtin_methods"),
        ("efftrain_ds.engine", "from .config.loader import load_config\nfrom .methods import builtin"),
        ("efftrain_ds.trainer", "from . import engine\nfrom .train_loop import x"),
        ("efftrain_ds.cli.a", "from .. import __version__, trainer"),
        ("efftrain_ds.engine", "from .embedded import embedded_schedule"),
        ("efftrain_ds", "from .cli import main"),
    ],
)
def test_allowed_imports(module: str, source: str) -> None:
    assert layer_problems(source, module, is_package=module == PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "source", "text"),
    [
        ("efftrain_ds.core.a", "from ..config import x", "core must not import config"),
        ("efftrain_ds.core.a", "def f():\n    import efftrain_ds.engine", "core must not import engine"),
        ("efftrain_ds.data.a", "from ..models.x import y", "data must not import models"),
        ("efftrain_ds.zero.a", "from ..checkpoint.x import y", "zero must not import checkpoint"),
        ("efftrain_ds.cost.a", "from ..observe import x", "cost must not import observe"),
        ("efftrain_ds.methods.svite.method", "from ..autoprog.x import y", "the method svite must not import"),
        ("efftrain_ds.methods.svite.method", "from .. import autoprog", "the method svite must not import"),
        ("efftrain_ds.methods.svite.method", "from ... import engine", "methods must not import engine"),
        ("efftrain_ds.methods.svite.method", "from ...trainer import x", "methods must not import trainer"),
        ("efftrain_ds.methods.svite.method", "from ...config.sections import x", "methods must not import config"),
        ("efftrain_ds.config.a", "from ..engine import x", "config must not import engine"),
        ("efftrain_ds.engine", "from .train_loop import x", "engine must not import trainer"),
        ("efftrain_ds.planning", "from .engine import x", "planning must not import engine"),
        ("efftrain_ds.engine", "from .unheard import x", "has no layer"),
        ("efftrain_ds.core.a", "import efftrain_ds", "has no layer"),
        ("efftrain_ds.unheard", "", "unheard has no layer"),
    ],
)
def test_forbidden_imports(module: str, source: str, text: str) -> None:
    problems = layer_problems(source, module)
    assert len(problems) == 1, problems
    assert text in problems[0]


def test_method_package_itself_is_checked() -> None:
    assert layer_problems("from ..autoprog import x", "efftrain_ds.methods.svite", is_package=True)
    assert not layer_problems("from .method import x", "efftrain_ds.methods.svite", is_package=True)


def test_kernel_rule() -> None:
    module = "efftrain_ds.kernels.crop.op"
    assert not kernel_problems(
        "import torch\nimport triton.language as tl\nfrom .reference import x\nimport os", module
    )
    assert len(kernel_problems("import deepspeed\nfrom ...core.errors import x\nimport timm", module)) == 3


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("efftrain_ds/zero/access.py", "from deepspeed.runtime.zero import x\ndeepspeed.runtime._y", 0),
        ("efftrain_ds/zero/rebuild.py", "import deepspeed", 1),
        ("efftrain_ds/zero/rebuild.py", "from deepspeed.utils import safe_get_full_fp32_param", 1),
        ("efftrain_ds/startup.py", "import deepspeed\ndeepspeed.initialize()\ndeepspeed.comm.get_rank()", 0),
        ("efftrain_ds/startup.py", "import deepspeed.runtime.engine", 1),
        ("efftrain_ds/startup.py", "import deepspeed\ndeepspeed.runtime.engine", 1),
        ("efftrain_ds/startup.py", "import deepspeed\ndeepspeed._private()", 1),
        ("efftrain_ds/startup.py", "from deepspeed import DeepSpeedEngine", 0),
        ("efftrain_ds/startup.py", "from deepspeed import _private", 1),
        ("efftrain_ds/startup.py", "from deepspeed.utils import groups", 1),
        ("efftrain_ds/startup.py", "import deepspeed\ndeepspeed.__version__", 0),
        ("efftrain_ds/train_loop.py", "from deepspeed.accelerator import get_accelerator", 0),
        ("efftrain_ds/methods/svite/method.py", "import deepspeed", 1),
        ("efftrain_ds/cli/plan.py", "def f():\n    import deepspeed", 1),
        ("efftrain_ds/planning.py", "def f(config):\n    return config.deepspeed.get('optimizer').get('x')", 0),
        ("efftrain_ds/startup.py", "def f():\n    from deepspeed.runtime import x", 1),
    ],
)
def test_deepspeed_rule(path: str, source: str, count: int) -> None:
    assert len(deepspeed_problems(source, path)) == count


def test_relative_imports_resolve() -> None:
    names = [name for name, _ in imports("from ..core import rng\nfrom . import x", "efftrain_ds.data.a", False)]
    assert names == ["efftrain_ds.core.rng", "efftrain_ds.data.x"]
    names = [name for name, _ in imports("from .a import b\nfrom .. import c", "efftrain_ds.data", True)]
    assert names == ["efftrain_ds.data.a.b", "efftrain_ds.c"]
