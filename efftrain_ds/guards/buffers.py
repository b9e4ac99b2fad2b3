"""Buffers that a forward pass writes (running statistics), so that a refused step leaves no trace in them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Kept:
    """One buffer: where it stands, its tensor and version when it was copied, and the copy."""

    owner: weakref.ref[nn.Module]
    name: str
    tensor: Tensor
    version: int
    copy: Tensor

    def now(self) -> Tensor | None:
        """The buffer that stands there now."""
        owner = self.owner()
        return owner._buffers.get(self.name) if owner is not None else None


class BufferKeeper:
    """Copies of a module's buffers. The module is not kept alive.

    Floating-point buffers are copied at every `save`, in one call, as batch normalisation writes its statistics without
    a trace in the tensors' version counters; others (indices, counters) only where that counter has moved.
    """

    def __init__(self, module: nn.Module):
        self._kept = [
            _Kept(weakref.ref(owner), name, buffer, buffer._version, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def save(self) -> None:
        """Note the values as they are now."""
        copies, sources = [], []
        for kept in self._kept:
            now = kept.now()
            if now is None or not (now.is_floating_point() or now is not kept.tensor or now._version != kept.version):
                continue
            if kept.copy.shape == now.shape and kept.copy.dtype == now.dtype and kept.copy.device == now.device:
                copies.append(kept.copy)
                sources.append(now)
            else:
                kept.copy = now.detach().clone()
            kept.tensor, kept.version = now, now._version
        if copies:
            torch._foreach_copy_(copies, sources)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back the values of the last `save`."""
        for kept in self._kept:
            owner = kept.owner()
            if owner is not None:
                kept.tensor.copy_(kept.copy)
                owner._buffers[kept.name] = kept.tensor
                kept.version = kept.tensor._version
