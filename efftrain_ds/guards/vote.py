"""What the ranks tell each other once a step, in one all-reduce of four integers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import DesyncError
from ..core.ranks import gather, world_size


@dataclass(frozen=True)
class Ballot:
    """Result of a vote, equal on all ranks.

    Attributes:
        nonfinite: some rank has a non-finite loss or gradient.
        stop: some rank was asked to stop.
        agreed: all ranks gave the same digest.
    """

    nonfinite: bool
    stop: bool
    agreed: bool


def digest_of(text: str) -> int:
    """62-bit digest, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def vote(device: torch.device, *, nonfinite: Tensor | None = None, stop: bool = False, digest: int = 0) -> Ballot:
    """Exchange flags and a digest. Collective; waits for the device once.

    The digest travels as ``h`` and ``-h``, so that one MAX shows whether all are equal.

    Args:
        device: of the process group's backend.
        nonfinite: 0-dim bool or integer on `device`; None = finite.
        stop: this rank was asked to stop.
        digest: of this rank's decisions, 0 <= digest < 2**62.
    """
    values = torch.tensor([0, int(stop), digest, -digest], dtype=torch.int64, device=device)
    if nonfinite is not None:
        values[0] = nonfinite
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    bad, asked, highest, lowest = values.tolist()
    return Ballot(bool(bad), bool(asked), highest == -lowest)


def compare(decisions: Mapping[str, str], step: int) -> None:
    """Find out which ranks decided otherwise, and say it on all of them. Collective.

    Raises:
        DesyncError: always, as this is called where the digests differ.
    """
    every = gather(dict(decisions))
    names = sorted({name for own in every for name in own})
    found = []
    for name in names:
        by_value: dict[str | None, list[int]] = {}
        for rank, own in enumerate(every):
            by_value.setdefault(own.get(name), []).append(rank)
        if len(by_value) > 1:
            parts = [f"rank {_ranks(ranks)}: {_short(value)}" for value, ranks in by_value.items()]
            found.append(f"{name} ({'; '.join(parts)})")
    raise DesyncError(
        f"step {step}: the ranks do not decide alike, so going on would train different models: {', '.join(found)}"
    )


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 300 else f"{value[:280]}... (digest {digest_of(value):x})"
