"""GPU, Triton, our kernels, and the compiled operations of DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

from .check import FAIL, NONE, OK, WARN, Check, Setup
from .software import installed


def gpu(setup: Setup) -> Check:
    """Devices that torch sees."""
    import torch

    if not setup.gpus:
        if shutil.which("nvidia-smi") and _answers(["nvidia-smi", "-L"]):
            why = f"the driver lists a GPU, torch {torch.__version__} (CUDA {torch.version.cuda}) does not see it"
            return Check("GPU", FAIL, why, "install a torch build for this driver, and check CUDA_VISIBLE_DEVICES")
        return Check("GPU", NONE, "no GPU: training runs on the CPU with gloo")
    properties = [torch.cuda.get_device_properties(i) for i in range(setup.gpus)]
    names = sorted({p.name for p in properties})
    memory = min(p.total_memory for p in properties)
    capability = min(torch.cuda.get_device_capability(i) for i in range(setup.gpus))
    text = (
        f"{setup.gpus} x {' / '.join(names)}, {memory / 2**30:.0f} GiB, capability {'.'.join(map(str, capability))}, "
    )
    text += f"CUDA {torch.version.cuda}"
    if setup.config is not None:
        from ..planning import precision_of

        if precision_of(setup.config.deepspeed) == "bf16" and not torch.cuda.is_bf16_supported():
            return Check("GPU", FAIL, f"{text}, without bf16", 'use "fp16" or fp32 in the configuration')
    if setup.world > setup.gpus and setup.local_ranks == setup.world:
        return Check("GPU", WARN, f"{text}, {setup.world} ranks share them", f"--num_gpus {setup.gpus}")
    return Check("GPU", OK, text)


def _answers(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def triton(setup: Setup) -> Check:
    """A Triton kernel can be compiled and gives the right numbers."""
    version = installed("triton")
    if version is None:
        return Check(
            "Triton", NONE if not setup.gpus else WARN, "not installed", "pip install triton" * bool(setup.gpus)
        )
    if not setup.gpus:
        return Check("Triton", NONE, f"{version}; no GPU to compile for")
    from .triton_probe import doubled

    why = doubled()
    if why is not None:
        return Check("Triton", WARN, f"{version}: {why}", "a C compiler and the CUDA driver's libcuda are needed")
    return Check("Triton", OK, f"{version}, compiles and runs")


def kernels(setup: Setup) -> Check:
    """Every kernel of this package on the device at hand."""
    from .. import kernels as package

    device = "cuda" if setup.gpus else "cpu"
    passed, failed = [], []
    for info in pkgutil.iter_modules(package.__path__):
        if not info.ispkg:
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            test = getattr(module, "self_test", None)
            if test is not None:
                passed.append(f"{info.name}: {test(device)}")
        except Exception as error:  # whatever it is, the other kernels are tested too
            failed.append(f"{info.name}: {type(error).__name__}: {error}")
    if failed:
        fix = "unset EFFTRAIN_KERNELS, or set it to reference: then torch computes them"
        return Check("kernels", FAIL, "; ".join(failed + passed), fix)
    return Check("kernels", OK, "; ".join(passed))


def compiler(setup: Setup) -> Check:
    """What DeepSpeed needs to compile its operations."""
    wanted = os.environ.get("CXX") or "c++"
    found = shutil.which(wanted) or shutil.which("g++")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None and not _wanted(setup):
        return Check("compiler", WARN, "no ninja; nothing of this configuration needs it", "pip install ninja")
    if ninja is None:
        where = "installed, but its folder is not on PATH" if installed("ninja") else "not installed"
        fix = "activate the environment (source .venv/bin/activate)" if installed("ninja") else "pip install ninja"
        return Check("compiler", FAIL, f"ninja: {where}; DeepSpeed cannot load its operations without it", fix)
    if found is None:
        missing = [name for name in _wanted(setup) if not _built(name)]
        if not missing:
            return Check("compiler", WARN, f"no {wanted}, but all operations are compiled", "install g++")
        return Check("compiler", FAIL, f"no C++ compiler ({wanted})", "apt-get install g++, or set CXX")
    text = f"{found}, ninja {installed('ninja') or ''}".strip()
    if setup.gpus and shutil.which("nvcc") is None and "fused_adam" in _wanted(setup):
        fix = 'set "torch_adam": true in optimizer.params, or install the CUDA toolkit'
        return Check("compiler", WARN, f"{text}; no nvcc, which DeepSpeed's fused Adam needs", fix)
    return Check("compiler", OK, text)


def extensions(setup: Setup) -> Check:
    """Operations of DeepSpeed that are compiled, and those that the first run would compile."""
    root = extensions_root()
    wanted = _wanted(setup)
    missing = [name for name in wanted if not _built(name)]
    built = [name for name in wanted if name not in missing]
    text = f"compiled: {', '.join(built) or 'none'} ({root})"
    folder = next((p for p in (root, *root.parents) if p.exists()), Path("/"))
    if missing and not os.access(folder, os.W_OK):
        return Check(
            "extensions", FAIL, f"{root} cannot be written", "set TORCH_EXTENSIONS_DIR to a folder of your own"
        )
    if missing:
        option = " --optimizers" if any("adam" in name for name in missing) else ""
        text = f"not compiled yet: {', '.join(missing)} (in {root}); the first run does it, 1 to 3 minutes"
        fix = f"python tools/build_extensions.py{option}" if not setup.gpus else "nothing, or start a short run first"
        return Check("extensions", WARN, text, fix)
    if (again := _compiled_again(root, built)) is not None:
        text = f"{text}, but {shutil.which('ninja')} would compile {again} again: another ninja or environment built it"
        fix = "use one environment for all commands (source .venv/bin/activate), or one TORCH_EXTENSIONS_DIR for each"
        return Check("extensions", WARN, text, fix)
    return Check("extensions", OK if wanted else NONE, text if wanted else f"none needed ({root})")


def _compiled_again(root: Path, names: list[str]) -> str | None:
    """An operation that ninja would compile although it is there: different versions of ninja disagree on that.

    Two environments that share a folder then compile in turn, minutes each time, while every other process waits.
    """
    for name in names:
        folder = next((p.parent for p in root.glob(f"**/{name}/build.ninja")), None)
        if folder is None or shutil.which("ninja") is None:
            continue
        done = subprocess.run(["ninja", "-n"], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        if "no work to do" not in done.stdout:
            return name
    return None


def extensions_root() -> Path:
    """Folder of compiled extensions: TORCH_EXTENSIONS_DIR, else torch's own."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _built(name: str) -> bool:
    """Compiled here, or delivered with DeepSpeed."""
    found = importlib.util.find_spec("deepspeed")
    places = [extensions_root(), *([Path(found.origin).parent / "ops"] if found is not None and found.origin else [])]
    patterns = (f"{name}/{name}.so", f"*/{name}/{name}.so", f"*/{name}_op*.so")
    return any(any(place.glob(pattern)) for place in places for pattern in patterns)


def _wanted(setup: Setup) -> list[str]:
    """Operations that the run loads: the CPU's collective, and DeepSpeed's own Adam unless torch's is set."""
    wanted = [] if setup.gpus else ["deepspeed_shm_comm"]
    if setup.config is None:
        return wanted
    deepspeed = setup.config.deepspeed
    optimizer = deepspeed.get("optimizer") or {}
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        zero = deepspeed.get("zero_optimization") or {}
        offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        if not (optimizer.get("params") or {}).get("torch_adam"):
            wanted.append("cpu_adam" if offloaded else "fused_adam")
    return wanted
