"""Compile Triton kernels without a GPU and check their machine code.

Register spills, tensor-core instructions of the wrong generation and too much shared memory are visible in the code
alone, so every shipped configuration is checked where no GPU is at hand::

    python -m efftrain_ds.kernels.gate --capability 90

Kernels must be compiled ones: run it without ``TRITON_INTERPRET``. Compilation takes seconds a variant; Triton keeps
the results in its cache, so that a second run is quick. For another version of Triton install it into a folder of its
own and put that first (``pip install --target=FOLDER --no-deps triton==3.6.0``, then ``PYTHONPATH=FOLDER`` before the
command); the first line of the table names the version that compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("lowfreq_crop.triton_fwd", "attention.resident", "attention.lists", "attention.shipped")
"""Modules of this package whose ``gate_cases()`` are checked."""

SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""Shared memory that one program may use, KiB by compute capability."""

MAX_REGISTERS = 255
_TYPES = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
_TYPES |= {"uint8": "u8", "bool": "i1", "int8": "i8"}
SHOWN = ("HGMMA", "HMMA", "MUFU.EX2", "LDL", "STL")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What one compiled variant needs.

    Attributes:
        registers: registers a thread.
        shared_bytes: shared memory a program.
        stack_bytes: stack a thread; more than 0 means arrays or registers in local memory.
        spills: loads from and stores to local memory.
        instructions: count of every opcode without modifiers ("HGMMA", "HMMA", "LDL", ...), and of "MUFU.EX2".
        seconds: time to compile, near 0 from the cache.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    instructions: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True)
class GateCase:
    """One variant to check.

    Attributes:
        name: shown in the table; ``--only`` selects by its parts.
        kernel: the ``@triton.jit`` function.
        signature: type of each argument that is no constant, see `compile_kernel`.
        constants: values of the constexpr arguments.
        num_warps: warps a program.
        num_stages: stages of software pipelining.
        capability: 80, 89, 90, ...
        wgmma: the code must multiply by HGMMA only (Hopper's tensor-core instruction on whole warp groups).
        quick: one of the few that run with the ordinary tests.
        exp2: the code must use the hardware's base-2 exponential (attention; the accurate one takes ten instructions).
        may_spill: spills are shown and are no violation: a variant that runs where it is forced only.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    capability: int = 90
    wgmma: bool = True
    quick: bool = False
    exp2: bool = False
    may_spill: bool = False


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile one variant of a kernel for a GPU that need not be there.

    Args:
        kernel: ``@triton.jit`` function, not interpreted.
        signature: type of each argument that is no constant: "*bf16", "i32", "fp32", ... As in a launch, pointers are
            taken as 16-byte aligned; append ":16" to an integer that is a multiple of 16 (":1" makes it the constant
            1), and ":4" or the like to a pointer that is aligned to fewer bytes (no hint is given then).
        constants: value of each constexpr argument.
        capability: 10 x major + minor compute capability.
        num_warps: warps a program.
        num_stages: stages of software pipelining.

    Raises:
        RuntimeError: the kernel is an interpreted one.
        ValueError: an argument of the kernel is in neither mapping or in both, or an unknown name is given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{kernel!r} is not a compiled kernel: unset TRITON_INTERPRET for the gate")
    types, values, attributes = _arguments(kernel, signature, constants)
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    start = time.perf_counter()
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        # fused multiply-add said aloud: newer Triton versions warn about the default, and will change it
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    return inspect(built.asm["cubin"], int(built.metadata.shared), time.perf_counter() - start)


def _arguments(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignment hints of a kernel's arguments in Triton's form."""
    names = list(kernel.arg_names)
    wrong = (set(signature) | set(constants)) - set(names)
    wrong |= {name for name in names if (name in signature) == (name in constants)}
    if wrong:
        raise ValueError(
            f"{kernel.__name__}: each argument is in the signature or in the constants, wrong: "
            + ", ".join(sorted(wrong))
        )
    types: dict[str, str] = {}
    values = dict(constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        kind, _, hint = str(signature.get(name, "constexpr")).partition(":")
        if name in signature and hint == "1":
            values[name] = 1
            kind = "constexpr"
        elif hint == "16" or (kind.startswith("*") and not hint):
            attributes[(index,)] = [["tt.divisibility", 16]]
        types[name] = kind
    return types, values, attributes


def inspect(cubin: bytes, shared_bytes: int, seconds: float = 0.0) -> Compiled:
    """Read registers, stack and instructions from machine code.

    Args:
        cubin: one kernel's binary.
        shared_bytes: dynamic shared memory of the launch, which the binary does not tell.
        seconds: passed on.

    Raises:
        RuntimeError: the disassembler's answer cannot be read.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    resources = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    opcodes = _OPCODE.findall(code)
    if "REG" not in resources or not opcodes:
        raise RuntimeError(f"cuobjdump's answer has no resources or no code:\n{usage[-500:]}")
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    counts["MUFU.EX2"] = sum(opcode.startswith("MUFU.EX2") for opcode in opcodes)
    return Compiled(
        registers=resources["REG"],
        shared_bytes=shared_bytes + resources.get("SHARED", 0),
        stack_bytes=resources.get("STACK", 0) + resources.get("LOCAL", 0),
        spills=counts["LDL"] + counts["STL"],
        instructions=counts,
        seconds=seconds,
    )


def _tool(name: str, *arguments: str) -> str:
    """Output of a CUDA tool that comes with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def check(compiled: Compiled, case: GateCase) -> list[str]:
    """What is wrong with a compiled variant; empty where nothing is."""
    wrong = []
    count = compiled.instructions
    if not case.may_spill and (compiled.spills or compiled.stack_bytes):
        wrong.append(
            f"spills: {compiled.stack_bytes} bytes of stack, {count['LDL']} local loads, {count['STL']} local stores"
        )
    if compiled.registers > MAX_REGISTERS:
        wrong.append(f"{compiled.registers} registers, at most {MAX_REGISTERS}")
    limit = SHARED_LIMIT.get(case.capability)
    if limit is None:
        wrong.append(f"no shared memory limit known for capability {case.capability}")
    elif compiled.shared_bytes > limit * 1024:
        wrong.append(f"{compiled.shared_bytes} bytes of shared memory, at most {limit * 1024}")
    if case.wgmma and not count["HGMMA"]:
        wrong.append("no HGMMA")
    if case.wgmma and count["HMMA"]:
        wrong.append(f"{count['HMMA']} HMMA beside {count['HGMMA']} HGMMA")
    if case.exp2 and not count["MUFU.EX2"]:
        wrong.append("no MUFU.EX2")
    return wrong


def recorded(launch: Callable[[], object]) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What a launcher would launch, without launching: so a check covers what ships and not a copy of it.

    Args:
        launch: calls kernels; tensors on the "meta" device do.

    Returns:
        For each launch the kernel, signature and constants as for `compile_kernel`, and num_warps and num_stages.

    Raises:
        RuntimeError: kernels are interpreted ones.
    """
    import torch
    import triton

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("kernels are interpreted here: unset TRITON_INTERPRET for the gate")
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: int(kwargs.pop(name)) for name in ("num_warps", "num_stages") if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        for parameter in kernel.params:
            value = values.get(parameter.name, parameter.default)
            if parameter.is_constexpr or value is None:
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{_TYPES[str(value.dtype).removeprefix('torch.')]}"
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                hint = "" if parameter.do_not_specialize else ":1" if value == 1 else ":16" if value % 16 == 0 else ""
                signature[parameter.name] = f"{'i32' if -(2**31) <= value < 2**31 else 'i64'}{hint}"
        found.append((kernel, signature, constants, options))

    before = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        launch()
    finally:
        triton.JITFunction.run = before
    return found


def collect(modules: Sequence[str] = MODULES) -> list[GateCase]:
    """The cases of all kernels; modules that do not exist are left out.

    Args:
        modules: names relative to this package, or absolute ones.

    Raises:
        ValueError: two cases for one capability have the same name.
    """
    cases: list[GateCase] = []
    for name in modules:
        full = f"{__package__}.{name}" if name in MODULES else name
        try:
            module = importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name is None or not full.startswith(error.name):
                raise
            continue
        cases += module.gate_cases()
    twice = [key for key, count in Counter((case.capability, case.name) for case in cases).items() if count > 1]
    if twice:
        raise ValueError(f"two gate cases of one name: {', '.join(f'{name} (sm_{cap})' for cap, name in twice)}")
    return cases


def run_case(case: GateCase) -> dict[str, Any]:
    """Compile and check one case; the row of the table."""
    row: dict[str, Any] = {"name": case.name, "capability": case.capability}
    row |= {"num_warps": case.num_warps, "num_stages": case.num_stages, "may_spill": case.may_spill}
    try:
        compiled = compile_kernel(
            case.kernel, case.signature, case.constants, case.capability, case.num_warps, case.num_stages
        )
    except Exception as error:  # whatever a compiler raises is this variant's result
        return {**row, "wrong": [f"does not compile: {type(error).__name__}: {str(error).strip()[-800:]}"]}
    row |= {name: getattr(compiled, name) for name in ("registers", "shared_bytes", "stack_bytes", "spills", "seconds")}
    row["instructions"] = {name: compiled.instructions[name] for name in SHOWN}
    return {**row, "wrong": check(compiled, case)}


_cases: list[GateCase] = []


def _run_index(index: int) -> dict[str, Any]:
    return run_case(_cases[index])


def run_cases(cases: Sequence[GateCase], processes: int = 2) -> list[dict[str, Any]]:
    """Rows of all cases, in their order, compiled in several processes."""
    _cases[:] = cases
    if processes < 2 or len(cases) < 2:
        return [run_case(case) for case in cases]
    # forked, since kernels cannot be pickled; nothing has been compiled in this process yet
    with multiprocessing.get_context("fork").Pool(min(processes, len(cases))) as pool:
        return pool.map(_run_index, range(len(cases)), chunksize=1)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, with what is wrong below each."""
    width = max([len(str(row["name"])) for row in rows], default=4)
    names = ("HGMMA", "HMMA", "MUFU.EX2")
    head = f"{'case':{width}s}  sm warps stages  regs shared KB  stack spills" + "".join(f"{n:>9s}" for n in names)
    lines = [head + "  seconds"]
    for row in rows:
        line = f"{row['name']:{width}s}  {row['capability']:2d} {row['num_warps']:5d} {row['num_stages']:6d}"
        if "registers" in row:
            line += (
                f" {row['registers']:5d} {row['shared_bytes'] / 1024:9.1f} {row['stack_bytes']:6d} {row['spills']:6d}"
            )
            line += "".join(f"{row['instructions'][name]:9d}" for name in names) + f" {row['seconds']:8.1f}"
        lines.append(line + ("  may spill" if row["may_spill"] else ""))
        lines += [f"  WRONG: {text}" for text in row["wrong"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the selected cases and print the table.

    Returns:
        0 without a violation, else 1; 2 where no case was selected.
    """
    parser = argparse.ArgumentParser(prog="python -m efftrain_ds.kernels.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, action="append", help="90, 120, ... (repeatable; default: all)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="names that contain it (repeatable)")
    parser.add_argument("--quick", action="store_true", help="only the cases of the ordinary tests")
    parser.add_argument("--module", action="append", metavar="NAME", help="modules with gate_cases() instead of ours")
    parser.add_argument("--processes", type=int, default=2, help="compile in so many processes")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    modules = args.module or (MODULES[:-1] if args.quick else MODULES)  # those of the table take a while to list
    cases = [
        case
        for case in collect(modules)
        if (not args.capability or case.capability in args.capability)
        and (not args.only or any(text in case.name for text in args.only))
        and (not args.quick or case.quick)
    ]
    if not cases:
        sys.stderr.write("no such case\n")
        return 2
    if args.list:
        _write("\n".join(f"sm_{case.capability} {case.name}" for case in cases))
        return 0
    import triton

    rows = run_cases(cases, args.processes)
    bad = sum(bool(row["wrong"]) for row in rows)
    if args.json:
        _write(json.dumps({"triton": triton.__version__, "violations": bad, "cases": rows}, indent=1))
    else:
        _write(f"Triton {triton.__version__}\n{table(rows)}\n{len(rows)} variants, {bad} with violations")
    return 1 if bad else 0


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
