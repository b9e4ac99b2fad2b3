"""Keeping some parameters exactly as they are through an optimizer step: weights and moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .access import Fragment, Layout


@dataclass
class _Kept:
    fragment: Fragment
    values: dict[str, Tensor]


class Hold:
    """A copy of masters and optimizer state of some parameters, taken before a step and put back after it.

    An optimizer that steps whole partitions decays the weights, and moves them by their momentum, also where the
    gradient is zero. The step counts are those of the partition and advance.

    Args:
        layout: of the engine.
        names: parameters to hold; the same on all ranks.
    """

    @torch.no_grad()
    def __init__(self, layout: Layout, names: Iterable[str]):
        self.layout = layout
        wanted = set(names)
        self._kept: list[_Kept] = []
        for fragment in layout.fragments:
            if fragment.name in wanted:
                self._kept.append(_Kept(fragment, {k: v.clone() for k, v in self._views(fragment).items()}))

    def _views(self, fragment: Fragment) -> dict[str, Tensor]:
        """Master and state of one fragment, only what exists."""
        master = self.layout.flats[fragment.flat].master
        found = {"fp32": self._part(master.data, fragment)}
        for key, value in self.layout.base.state.get(master, {}).items():
            if torch.is_tensor(value) and value.shape == master.shape:
                found[key] = self._part(value, fragment)
        return found

    @staticmethod
    def _part(tensor: Tensor, fragment: Fragment) -> Tensor:
        return tensor.view(-1).narrow(0, fragment.offset, fragment.length)

    def restore(self) -> None:
        """Put everything back and refresh the working weights. Collective."""
        self.put_back()
        self.layout.push()

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back, but leave the working weights: for use before DeepSpeed itself refreshes them."""
        for kept in self._kept:
            for key, view in self._views(kept.fragment).items():
                if key in kept.values:
                    view.copy_(kept.values[key])
                else:  # state that this step created
                    view.zero_()
