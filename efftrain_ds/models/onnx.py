"""Networks as ONNX by torch's exporter, without the long story that it tells on the screen."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError


def onnx_program(model: nn.Module, inputs: Tensor, **options: Any) -> torch.onnx.ONNXProgram:
    """Trace a network; the result has a `save`.

    Args:
        model: in evaluation mode.
        inputs: example of its one input; the program takes this shape alone unless `options` name dynamic axes.
        options: of ``torch.onnx.export``.

    Raises:
        ModelError: torch cannot express the network in ONNX.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (inputs,), dynamo=True, verbose=False, **options)
    except Exception as error:  # the exporter raises many types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} cannot be written as ONNX: {first}") from error
    finally:
        log.setLevel(level)
    assert program is not None
    return program
