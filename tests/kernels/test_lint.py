"""Rules that no run on a CPU can check: the interpreter hides what breaks them."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
ALLOWED_IMPORTS = {"torch", "triton", "numpy"}
FORBIDDEN = {
    "autotune": "chooses at run time, ranks may differ, and fails inside a graph capture",
    "make_block_ptr": "gone in Triton 3.9",
    "make_tensor_descriptor": "needs an allocator hook",
}


def called(node):
    """Dotted name of what a call or decorator names: "tl.load"; "" for anything else."""
    node = node.func if isinstance(node, ast.Call) else node
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def broken(source, name):
    """Lines of a source file that break a rule, each as "name:line: why"."""
    tree = ast.parse(source)
    language = set()  # names under which triton.language is known
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            language |= {alias.asname or alias.name for alias in node.names if alias.name == "triton.language"}
        elif isinstance(node, ast.ImportFrom) and node.module == "triton":
            language |= {alias.asname or alias.name for alias in node.names if alias.name == "language"}
    product = {
        id(inner)
        for node in ast.walk(tree)
        if name == "blocks.py" and isinstance(node, ast.FunctionDef) and node.name == "product"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.module == "triton.language":
            yield f"{line}: import triton.language as tl, so that these rules see its calls"
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for root in {full.split(".")[0] for full in names} & {"efftrain_ds", "deepspeed", "timm", "torchvision"}:
                yield f"{line}: imports {root}; kernels import {', '.join(sorted(ALLOWED_IMPORTS))} only"
        if (
            isinstance(node, ast.Attribute)
            and node.attr in FORBIDDEN
            and called(node).split(".")[0] in language | {"triton"}
        ):
            yield f"{line}: {node.attr} {FORBIDDEN[node.attr]}"
        if not isinstance(node, ast.Call):
            continue
        module, _, function = called(node).rpartition(".")
        if module not in language:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if function == "load":
            masked = "mask" in given or len(node.args) > 1
            if masked and "other" not in given and len(node.args) < 3:
                yield f"{line}: masked load without other="
            if "boundary_check" in given:
                yield f"{line}: boundary_check belongs to block pointers"
        if function.startswith("atomic_"):
            yield f"{line}: {function} makes results depend on the order"
        if function in ("dot", "dot_scaled") and id(node) not in product:
            yield f"{line}: {function} outside blocks.product, wrong for bf16 under the interpreter"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KERNELS)))
def test_rules(path):
    assert list(broken(path.read_text(), str(path.relative_to(KERNELS)))) == []


def test_finds_the_kernels():
    names = {str(path.relative_to(KERNELS)) for path in FILES}
    assert {"blocks.py", "gate.py", "lowfreq_crop/op.py"} <= names
    assert "tl.dot" in (KERNELS / "blocks.py").read_text()


HEAD = "import triton\nimport triton.language as tl\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x = tl.load(p + i, mask=i < n)", "masked load"),
        ("x = tl.load(p + i, i < n)", "masked load"),
        ("x = tl.load(p + i, mask=i < n, other=0.0)", None),
        ("x = tl.load(p + i, i < n, 0.0)", None),
        ("x = tl.load(p + i)", None),
        ("tl.store(p + i, x, mask=i < n)", None),
        ("tl.atomic_add(p, x)", "atomic_add"),
        ("x = tl.dot(a, b)", "dot outside"),
        ("x = tl.dot_scaled(a, s, 'e4m3', b, t, 'e4m3')", "dot_scaled outside"),
        ("x = tl.make_block_ptr(p, s, t, o, b, r)", "make_block_ptr"),
        ("@triton.autotune(configs=[], key=[])\ndef f():\n    pass", "autotune"),
        ("from triton.language import load", "import triton.language as tl"),
        ("from efftrain_ds.core import errors", "imports efftrain_ds"),
        ("import torch.nn.functional as F", None),
        ("x = torch.load(p, mask=1)", None),
        ("def product(a, b):\n    return tl.dot(a, b)", "dot outside"),
    ],
)
def test_each_rule(line, found):
    lines = list(broken(HEAD + line, "x.py"))
    assert len(lines) == (found is not None), lines
    assert found is None or found in lines[0]
    assert list(broken(HEAD + "def product(a, b):\n    return tl.dot(a, b)", "blocks.py")) == []
    assert list(broken("from triton import language as L\nL.atomic_add(p, x)", "x.py"))
