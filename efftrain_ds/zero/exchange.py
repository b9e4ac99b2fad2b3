"""Moving tensors between two partitionings of (possibly different) parameters, exactly, to the bit.

Each rank knows which stretches of which flattened tensors every rank held before (`old`) and holds now (`new`). Whole
copies move as intersections of intervals with one uneven all-to-all per bucket; a tensor with index maps is gathered
one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.ranks import gather, rank, world_size
from .request import ParameterMap

BUCKET_ELEMENTS = 1 << 21
"""Elements moved by one all-to-all (8 MiB of fp32), unless one tensor is larger."""

Stretch = tuple[str, int, int]
"""(name, first element of the flattened tensor, number of elements)."""


@dataclass
class Held:
    """What one rank holds of one tensor: `values` is a 1-D view of its stretch."""

    name: str
    start: int
    values: Tensor

    @property
    def stretch(self) -> Stretch:
        """Name, first element and length."""
        return self.name, self.start, self.values.numel()


@dataclass
class Table:
    """Stretches of all ranks.

    Attributes:
        ranks: stretches of each rank, in its own order.
        replicated: names of which every rank holds the whole tensor.
    """

    ranks: list[dict[str, list[tuple[int, int]]]]
    replicated: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def gather(cls, held: Sequence[Held], replicated: frozenset[str]) -> Table:
        """Collect the stretches of all ranks. Collective."""
        mine: dict[str, list[tuple[int, int]]] = {}
        for name, start, length in (h.stretch for h in held):
            mine.setdefault(name, []).append((start, length))
        return cls(gather(mine), replicated)

    def untiled(self, sizes: Mapping[str, int]) -> list[str]:
        """Names whose stretches do not cover every element exactly once."""
        wrong = []
        for name, size in sizes.items():
            ranks = self.ranks[:1] if name in self.replicated else self.ranks
            at = 0
            for start, length in sorted(s for held in ranks for s in held.get(name, ())):
                if start != at:
                    break
                at += length
            if at != size:
                wrong.append(name)
        return wrong


class Exchange:
    """Transfers between an old and a new partitioning.

    Args:
        old: where everything was.
        new: where everything goes.
        maps: origin of each new tensor; a name that is not in it comes whole from the same name.
        shapes: new shape of each new tensor.
        old_shapes: old shape of each old tensor.
        device: where buffers for communication live.
    """

    def __init__(
        self,
        old: Table,
        new: Table,
        maps: Mapping[str, ParameterMap],
        shapes: Mapping[str, torch.Size],
        old_shapes: Mapping[str, torch.Size],
        device: torch.device,
    ):
        self.old, self.new, self.maps = old, new, maps
        self.shapes, self.old_shapes, self.device = shapes, old_shapes, device
        self.me, self.world = rank(), world_size()

    def _source(self, name: str) -> str | None:
        """The old tensor that `name` copies whole; None where pieces or initial values are involved."""
        target = self.maps.get(name)
        if target is None:
            return name
        if len(target.pieces) == 1 and target.pieces[0].whole and target.init is None:
            return target.pieces[0].source
        return None

    @torch.no_grad()
    def move(
        self,
        key: str,
        sources: Sequence[Held],
        targets: Sequence[Held],
        *,
        names: Sequence[str],
        present: frozenset[str],
        initial: Callable[[str], Tensor | None] = lambda name: None,
    ) -> None:
        """Fill `targets` for one key. Collective; all ranks pass the same `names` and `present`.

        Args:
            key: "fp32", "ema" or a state key; picks the scale of pieces.
            sources: what this rank held.
            targets: views to write, of this rank.
            names: new tensors to fill, in an order equal on all ranks.
            present: old tensors that have values for this key; the others count as zeros.
            initial: full initial values of a new tensor with index maps, or None for zeros.
        """
        mine: dict[str, list[Held]] = {}
        for held in sources:
            mine.setdefault(held.name, []).append(held)
        wanted: dict[str, list[Held]] = {}
        for held in targets:
            wanted.setdefault(held.name, []).append(held)
        flat: list[tuple[str, str]] = []
        for name in names:
            source = self._source(name)
            carried = key in ("fp32", "ema") or name not in self.maps or self.maps[name].moments
            if source is not None and source in present and carried:
                flat.append((name, source))
            elif not carried or (source is not None and source not in present):
                for held in wanted.get(name, ()):
                    held.values.zero_()
            else:
                self._mapped(key, name, mine, wanted.get(name, ()), present, initial)
        for bucket in self._buckets(flat):
            self._whole(bucket, mine, wanted)

    def _buckets(self, pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
        bucket: list[tuple[str, str]] = []
        size = 0
        for pair in pairs:
            count = self.shapes[pair[0]].numel()
            if bucket and size + count > BUCKET_ELEMENTS:
                yield bucket
                bucket, size = [], 0
            bucket.append(pair)
            size += count
        if bucket:
            yield bucket

    def _overlaps(
        self, bucket: Sequence[tuple[str, str]], sender: int, receiver: int
    ) -> Iterator[tuple[str, int, int, str, int, int]]:
        """(new name, its stretch, old name, its stretch, first, last) for everything `sender` gives `receiver`."""
        for name, source in bucket:
            if source in self.old.replicated and sender != receiver:
                continue  # the receiver has it itself
            theirs = self.old.ranks[sender].get(source)
            if not theirs:
                continue
            for number, (start, length) in enumerate(self.new.ranks[receiver].get(name, ())):
                for other, (first, count) in enumerate(theirs):
                    low, high = max(start, first), min(start + length, first + count)
                    if low < high:
                        yield name, number, low, source, other, high

    def _whole(
        self, bucket: Sequence[tuple[str, str]], mine: Mapping[str, list[Held]], wanted: Mapping[str, list[Held]]
    ) -> None:
        for name, number, low, source, other, high in self._overlaps(bucket, self.me, self.me):
            target, origin = wanted[name][number], mine[source][other]
            target.values[low - target.start : high - target.start].copy_(
                origin.values[low - origin.start : high - origin.start]
            )
        if self.world == 1:
            return
        gives, counts = self._sizes(bucket)
        needed = torch.tensor(int(any(gives) or any(counts)), device=self.device)
        dist.all_reduce(needed, dist.ReduceOp.MAX)
        if not needed.item():
            return
        sent = torch.empty(sum(gives), dtype=torch.float32, device=self.device)
        at = 0
        for receiver in range(self.world):
            if receiver == self.me:
                continue
            for _, _, low, source, other, high in self._overlaps(bucket, self.me, receiver):
                origin = mine[source][other]
                sent[at : at + high - low].copy_(origin.values[low - origin.start : high - origin.start])
                at += high - low
        received = torch.empty(sum(counts), dtype=torch.float32, device=self.device)
        dist.all_to_all_single(received, sent, counts, gives)
        at = 0
        for sender in range(self.world):
            if sender == self.me:
                continue
            for name, number, low, _, _, high in self._overlaps(bucket, sender, self.me):
                target = wanted[name][number]
                target.values[low - target.start : high - target.start].copy_(received[at : at + high - low])
                at += high - low

    def _sizes(self, bucket: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Elements this rank gives to, and gets from, every rank."""

        def count(sender: int, receiver: int) -> int:
            if sender == receiver:
                return 0
            return sum(high - low for _, _, low, _, _, high in self._overlaps(bucket, sender, receiver))

        others = range(self.world)
        return [count(self.me, r) for r in others], [count(s, self.me) for s in others]

    def full(self, source: str, mine: Mapping[str, list[Held]]) -> Tensor:
        """A whole old tensor on every rank, fp32 and exact (bits are summed, so -0.0 and NaN survive). Collective."""
        shape = self.old_shapes[source]
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
        for held in mine.get(source, ()):
            whole[held.start : held.start + held.values.numel()].copy_(held.values)
        if self.world > 1 and source not in self.old.replicated:
            dist.all_reduce(whole.view(torch.int32))
        return whole.view(shape)

    def _mapped(
        self,
        key: str,
        name: str,
        mine: Mapping[str, list[Held]],
        targets: Sequence[Held],
        present: frozenset[str],
        initial: Callable[[str], Tensor | None],
    ) -> None:
        needed = sorted({piece.source for piece in self.maps[name].pieces} & present)
        whole = {source: self.full(source, mine) for source in needed}
        # drawn on every rank, so that a function that fails does so on all of them
        first = initial(name)
        if not targets:
            return
        result = mapped_values(key, self.maps[name], self.shapes[name], whole, first, self.device)
        for held in targets:
            held.values.copy_(result.reshape(-1)[held.start : held.start + held.values.numel()])


def mapped_values(
    key: str,
    target: ParameterMap,
    shape: torch.Size,
    sources: Mapping[str, Tensor],
    initial: Tensor | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Values of a new tensor from whole old ones. [shape], fp32

    Args:
        key: "fp32", "ema" or a state key.
        target: the map.
        shape: of the new tensor.
        sources: whole old tensors by name; missing ones count as zeros.
        initial: where no piece writes (values only); None = zeros.
        device: of the result.
    """
    result = torch.zeros(shape, dtype=torch.float32, device=device)
    if initial is not None and key in ("fp32", "ema"):
        result.copy_(initial)
    for piece in target.pieces:
        if piece.source not in sources:
            continue
        values = sources[piece.source]
        for dim, indices in piece.take.items():
            values = values.index_select(dim, _index(indices, device))
        factor = piece.scale.get("fp32" if key == "ema" else key, 1.0)
        if factor != 1.0:
            values = values * factor
        if not piece.put:
            result.copy_(values)
            continue
        index = []
        for dim, size in enumerate(shape):
            picked = list(piece.put.get(dim, range(size)))
            view = [1] * len(shape)
            view[dim] = len(picked)
            index.append(_index(picked, device).view(view))
        result[tuple(index)] = values
    return result


def _index(indices: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.as_tensor(list(indices), dtype=torch.long, device=device)  # an empty list would become float
