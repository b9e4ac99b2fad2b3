"""Nested state as JSON plus tensors, without pickle.

Tensors inside dictionaries and lists are lifted out under a key; everything else must be plain (None, bool, int,
float, str). Tuples and integer dictionary keys survive the round trip.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import CheckpointError

_MARK = "__efftrain__"


def to_plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of `value`; its tensors are added to `tensors` under names that begin with `where`.

    Raises:
        CheckpointError: a value of another type; the text names its place.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        if type(value) in (int, float):
            return value if value == value and abs(value) != float("inf") else {_MARK: "float", "value": str(value)}
        return to_plain(value.item() if hasattr(value, "item") else value.value, where, tensors)
    if isinstance(value, np.generic):
        return to_plain(value.item(), where, tensors)
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(np.ascontiguousarray(value)).clone()
        return {_MARK: "ndarray", "key": where}
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {_MARK: "tensor", "key": where}
    if isinstance(value, tuple):
        return {_MARK: "tuple", "items": [to_plain(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [to_plain(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value) and _MARK not in value:
            return {k: to_plain(v, f"{where}.{k}", tensors) for k, v in value.items()}
        if all(isinstance(k, (str, int)) for k in value):
            items = [[k, to_plain(v, f"{where}.{k}", tensors)] for k, v in value.items()]
            return {_MARK: "dict", "items": items}
    raise CheckpointError(
        f"{where}: cannot store a {type(value).__module__}.{type(value).__qualname__}; allowed are tensors, numbers, "
        "strings, lists, tuples and dictionaries of them"
    )


def from_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `to_plain`."""
    if isinstance(value, list):
        return [from_plain(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {k: from_plain(v, tensors) for k, v in value.items()}
    if kind == "tensor":
        return tensors[value["key"]]
    if kind == "ndarray":
        return tensors[value["key"]].numpy()
    if kind == "tuple":
        return tuple(from_plain(v, tensors) for v in value["items"])
    if kind == "dict":
        return {k: from_plain(v, tensors) for k, v in value["items"]}
    return float(value["value"])
