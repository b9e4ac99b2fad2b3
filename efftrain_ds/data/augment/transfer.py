"""Several small host arrays to a device in one copy."""

from __future__ import annotations

from itertools import accumulate

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
        """Make everything available on `device`; call once, after the last `add`."""
        if device.type == "cpu":
            self._views = [torch.from_numpy(array) for array in self._arrays]
        else:
            self._views = self.unpack(self.pack(device.type == "cuda").to(device, non_blocking=True))

    def pack(self, pinned: bool = False) -> Tensor:
        """All arrays in one [bytes] uint8 host tensor, each at a multiple of eight bytes."""
        buffer = torch.empty(self._starts()[-1], dtype=torch.uint8, pin_memory=pinned)
        host = buffer.numpy()
        for start, array in zip(self._starts(), self._arrays, strict=False):
            host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """Views of a packed buffer, in the order of the tickets."""
        return [
            buffer[start : start + array.nbytes].view(_TORCH[array.dtype]).view(array.shape)
            for start, array in zip(self._starts(), self._arrays, strict=False)
        ]

    def _starts(self) -> list[int]:
        """Offset of each array and the total length in bytes."""
        return [0, *accumulate(-(-array.nbytes // 8) * 8 for array in self._arrays)]

    def get(self, ticket: int) -> Tensor:
        """The array of `ticket`, on the device."""
        return self._views[ticket]
