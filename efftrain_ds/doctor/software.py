"""Python, the libraries, the configuration and its plan."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from ..core.text import bytes_text
from .check import FAIL, NONE, OK, WARN, Check, Setup

DISTRIBUTION = "efftrain-ds"
SHOWN = ("torch", "torchvision", "deepspeed", "timm", "webdataset")
"""Libraries with a line of their own."""
_PYTHONS = ((3, 10), (3, 12))


def python(setup: Setup) -> Check:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    low, high = _PYTHONS
    if low <= sys.version_info[:2] <= high:
        return Check("Python", OK, version)
    names = [".".join(map(str, pair)) for pair in _PYTHONS]
    return Check(
        "Python", FAIL, f"{version}, allowed: {names[0]} to {names[1]}", f"make a new environment with {names[1]}"
    )


def requirements() -> dict[str, Any]:
    """Allowed versions of our libraries by name, for this platform; empty where the package is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {r.name: r.specifier for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def installed(name: str) -> str | None:
    """Version of a library, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def libraries(setup: Setup) -> Iterator[Check]:
    """Every library is there, in an allowed version, and can be imported."""
    allowed = requirements()
    if not allowed:
        yield Check("package", WARN, f"{DISTRIBUTION} is not installed, so versions are not known", "pip install -e .")
    for name in SHOWN:
        yield _library(name, allowed.get(name))
    others = [name for name in allowed if name not in SHOWN]
    wrong = [
        f"{name} {version or 'missing'} (allowed: {allowed[name] or 'any'})"
        for name in others
        if (version := installed(name)) is None or not allowed[name].contains(version, prereleases=True)
    ]
    if wrong:
        yield Check("other libraries", FAIL, "; ".join(wrong), f"pip install --upgrade {DISTRIBUTION}")
    elif others:
        yield Check("other libraries", OK, f"{len(others)} in the allowed range")


def _library(name: str, allowed: Any) -> Check:
    version = installed(name)
    wish = f'pip install "{name}{allowed}"' if allowed else f"pip install {name}"
    if version is None:
        return Check(name, FAIL, "not installed", wish)
    if allowed and not allowed.contains(version, prereleases=True):
        return Check(name, FAIL, f"{version}, allowed: {allowed}", wish)
    if name == "torchvision" and (problem := _other_torch(version)):
        return Check(name, FAIL, problem, wish.replace("torchvision", "torch torchvision", 1).replace('"', ""))
    try:
        importlib.import_module(name)
    except Exception as error:
        return Check(name, FAIL, f"{version} cannot be imported: {type(error).__name__}: {error}", wish)
    text = version
    if name == "deepspeed":
        from ..zero.access import TESTED_VERSIONS

        tested = ", ".join(TESTED_VERSIONS)
        if version not in TESTED_VERSIONS:
            fix = f"pip install deepspeed=={TESTED_VERSIONS[-1]}"
            return Check(name, WARN, f"{version}, in the allowed range but tested was {tested}", fix)
        text += ", a tested version"
    if name == "torchvision":
        text += f", made for torch {installed('torch')}"
    return Check(name, OK, text)


def _other_torch(version: str) -> str | None:
    """Why this torchvision is not made for the installed torch."""
    from packaging.requirements import Requirement

    for line in metadata.requires("torchvision") or ():
        wanted, found = Requirement(line), installed("torch")
        if wanted.name == "torch" and found and not wanted.specifier.contains(found, prereleases=True):
            return f"{version} was made for torch {wanted.specifier}, installed is {found}"
    return None


def configuration(setup: Setup) -> Check:
    """The configuration holds no mistake."""
    if setup.path is None:
        return Check("configuration", NONE, "none given: efftrain doctor FILE checks a run's needs too")
    if setup.error is not None:
        issues = getattr(setup.error, "issues", ())
        text = "; ".join(f"{i.key}: {i.text}" for i in issues[:4]) or str(setup.error)
        more = f" and {len(issues) - 4} more" if len(issues) > 4 else ""
        return Check("configuration", FAIL, text + more, f"correct the file, then: efftrain validate {setup.path}")
    assert setup.config is not None
    methods = ", ".join(setup.config.methods) or "none"
    if setup.config.warnings:
        text = "; ".join(f"{i.key}: {i.text}" for i in setup.config.warnings)
        return Check("configuration", WARN, text, f"efftrain validate {setup.path}")
    return Check("configuration", OK, f"{setup.path}, methods: {methods}")


def plan(setup: Setup) -> Check:
    """The run can be planned, and its estimate of memory fits the device."""
    if setup.config is None:
        return Check("plan", NONE, "no configuration")
    if not setup.config.efftrain.model.name:
        return Check("plan", NONE, "efftrain.model.name is not given (a model of your own)")
    found = setup.plan
    if found is None:
        return Check("plan", FAIL, str(setup.problem), f"efftrain plan {setup.path} --world {setup.world}")
    peak = max(s.memory.total for s in found.stages)
    text = (
        f"{found.schedule.total_steps:,} steps in {len(found.stages)} stages on {setup.world} "
        f"rank{'s' if setup.world != 1 else ''}, about {bytes_text(peak)} a rank"
    )
    if setup.gpus:
        import torch

        memory = torch.cuda.get_device_properties(0).total_memory
        if peak > memory:
            fix = "lower train_micro_batch_size_per_gpu, or raise zero_optimization.stage"
            return Check("plan", WARN, f"{text}, the GPU has {bytes_text(memory)} (estimate)", fix)
    return Check("plan", OK, text, data={"peak_memory": peak, "parameters": found.params})
