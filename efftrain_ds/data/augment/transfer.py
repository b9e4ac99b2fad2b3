"""Several small host arrays to a device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}


class Transfer:
    """Collects arrays, sends them as one buffer and hands out views of it.

    The buffer is pinned and copied without blocking for a GPU, so the host never waits for the device.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._views: list[Tensor] = []

    def add(self, array: np.ndarray) -> int:
        """Take an array (int64, float32 or uint8); returns its ticket for `get`."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> None:
        """Copy everything to `device`; call once, after the last `add`."""
        if device.type == "cpu":
            self._views = [torch.from_numpy(array) for array in self._arrays]
            return
        starts, total = [], 0
        for array in self._arrays:
            starts.append(total)
            total += -(-array.nbytes // 8) * 8  # eight-byte alignment, so that every view is legal
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        host = buffer.numpy()
        for start, array in zip(starts, self._arrays, strict=True):
            host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        sent = buffer.to(device, non_blocking=True)
        self._views = [
            sent[start : start + array.nbytes].view(_TORCH[array.dtype]).view(array.shape)
            for start, array in zip(starts, self._arrays, strict=True)
        ]

    def get(self, ticket: int) -> Tensor:
        """The array of `ticket`, on the device."""
        return self._views[ticket]
