"""Where the kernel tests run, and how their errors are measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efftrain_ds.kernels import runtime

GPU = torch.cuda.is_available()
INTERPRETED = runtime.interpreted()
DEVICE = "cuda" if GPU else "cpu"

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU; the interpreter runs the small cases")
needs_kernels = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="neither a GPU nor TRITON_INTERPRET=1 before Triton was imported"
)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; absolute where the reference is zero."""
    assert torch.isfinite(out).all(), "NaN or inf"
    difference = (out.detach().double() - reference.detach().double()).norm()
    norm = reference.detach().double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def poisoned(like: Tensor) -> Tensor:
    """A buffer of the shape, strides' order and dtype of `like`, full of NaN."""
    return torch.full_like(like, float("nan"))
