"""N:M form: every group of M neighbours along the input keeps exactly N entries (2:4 runs on sparse tensor cores).

Shape legend: weight [out, in], groups [out, in / M, M]; tiles [out / 4, in / 4, 4, 4].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from ...core.errors import ConfigError, ModelError
from .densities import mask_rng
from .rules import Rule, Update, random_order, top_k

_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


@lru_cache(maxsize=1)
def _patterns() -> Tensor:
    """[90, 4, 4] boolean: all tiles with two live entries in every row and column."""
    rows = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
    every = torch.tensor(rows)[torch.cartesian_prod(*[torch.arange(6)] * 4)]
    return every[(every.sum(1) == 2).all(1)]


@lru_cache(maxsize=1)
def _switches() -> tuple[Tensor, Tensor]:
    """([72, 16] entries that die, [72, 16] entries that live): exchanges that keep all sums of a 4 x 4 tile."""
    out, into = [], []
    for (r, s), (c, d) in ((r, c) for r in combinations(range(4), 2) for c in combinations(range(4), 2)):
        pair = torch.zeros(2, 16, dtype=torch.bool)
        pair[0, [4 * r + c, 4 * s + d]] = True
        pair[1, [4 * r + d, 4 * s + c]] = True
        out += [pair[0], pair[1]]
        into += [pair[1], pair[0]]
    return torch.stack(out), torch.stack(into)


def _tiles(x: Tensor) -> Tensor:
    """[out, in] to [tiles, 16]."""
    rows, columns = x.shape
    return x.reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)


def _untile(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, columns = shape
    return x.reshape(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class NMRule(Rule):
    """One exchange in each of the best groups, so that N:M holds exactly after every update.

    In a group (or tile), the smallest weights are the candidates to drop. One-way: the live entry of smallest |W| and
    the dead one of largest |G|. Two-way: of the exchanges of two entries that keep all sums of the 4 x 4 tile, the one
    that drops the least |W|.

    Attributes:
        n: live entries of a group.
        m: entries of a group.
        two_way: 4 x 4 tiles with 2 live entries in every row and column, so that the transposed weight is 2:4 too.
        grow: "gradient" or "random".
        rank: which groups exchange: those of the largest grown |G| ("grow") or of the smallest dropped |W| ("drop").
    """

    n: int = 2
    m: int = 4
    two_way: bool = False
    grow: str = "gradient"
    rank: str = "grow"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConfigError(f"N:M is {self.n}:{self.m}, allowed: 0 < N < M")
        if self.two_way and (self.n, self.m) != (2, 4):
            raise ConfigError(f"two-way tiles are 2:4, found {self.n}:{self.m}")
        if self.grow not in ("gradient", "random") or self.rank not in ("grow", "drop"):
            raise ConfigError(f'N:M growth "{self.grow}" by "{self.rank}", allowed: gradient, random by grow, drop')

    @property
    def needs_dense_gradient(self) -> bool:
        """True for growth by gradient."""
        return self.grow == "gradient"

    @property
    def density(self) -> float:
        """Kept share N / M, in every layer."""
        return self.n / self.m

    def unit_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's own shape, if N:M fits it.

        Raises:
            ModelError: it does not.
        """
        if len(shape) != 2 or shape[1] % self.m or (self.two_way and shape[0] % 4):
            wanted = "sides in multiples of 4" if self.two_way else f"an input side in multiples of {self.m}"
            raise ModelError(f"{name} {list(shape)}: {self.n}:{self.m} needs a matrix with {wanted}")
        return tuple(shape)

    def fit_count(self, name: str, shape: tuple[int, ...], count: int) -> int:
        """Live entries under N:M, whatever `count` is."""
        rows, columns = self.unit_shape(name, shape)
        return rows * columns // self.m * self.n

    def initial(self, name: str, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
        """Random first mask; `count` must be what N:M makes of the shape.

        Raises:
            ModelError: the shape or the count does not fit.
        """
        rows, columns = self.unit_shape(name, shape)
        if count != self.fit_count(name, shape, count):
            raise ModelError(
                f"{name}: {self.n}:{self.m} keeps {self.fit_count(name, shape, count)} entries, not {count}"
            )
        generator = mask_rng(seed, name, "initial")
        if self.two_way:
            drawn = torch.randint(len(_patterns()), (rows * columns // 16,), generator=generator)
            return _untile(_patterns()[drawn], shape)
        keys = torch.rand(rows * columns // self.m, self.m, generator=generator)
        ranks = keys.argsort(dim=1, stable=True).argsort(1)
        return (ranks < self.n).view(rows, columns)

    def swaps(self, alpha: float, mask: Tensor, count: int | None = None) -> int:
        """Groups (tiles) that exchange: floor(alpha x groups)."""
        return math.floor(alpha * (mask.numel() // (16 if self.two_way else self.m)))

    def update(
        self,
        weight: Tensor,
        gradient: Tensor | None,
        mask: Tensor,
        k: int,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Update:
        """Exchange in `k` groups; see the class.

        Raises:
            ValueError: the count would change, or a needed gradient is missing.
        """
        if count is not None and count != int(mask.sum()):
            raise ValueError(f"{self.n}:{self.m} keeps {int(mask.sum())} entries, not {count}")
        if self.grow == "random":
            wish = random_order(mask, generator).double() + 1  # above 0, as an |G|
        elif gradient is None:
            raise ValueError("N:M growth needs the dense gradient, and none was given")
        else:
            wish = gradient.abs().double().nan_to_num(0.0)
        size = weight.abs().double().nan_to_num(math.inf)
        propose = self._tile_exchange if self.two_way else self._group_exchange
        out, into, drop, gain = propose(size, wish, mask)
        best = top_k(gain if self.rank == "grow" else -drop, torch.ones_like(gain, dtype=torch.bool), k)[:, None]
        shape = tuple(mask.shape)
        dropped, grown = (_untile(x, shape) if self.two_way else x.view(shape) for x in (out & best, into & best))
        return Update((mask & ~dropped) | grown, dropped, grown, 0.0)

    def _group_exchange(self, size: Tensor, wish: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size, wish, live = (x.reshape(-1, self.m) for x in (size, wish, mask))
        # sorts, as argmin promises no order among equal values; dead entries behind live ones even at inf
        last = torch.finfo(size.dtype).max
        drop = size.clamp(max=last / 2).masked_fill(~live, last).argsort(dim=1, stable=True)[:, :1]
        grow = wish.clamp(max=last).masked_fill(live, -1).argsort(dim=1, descending=True, stable=True)[:, :1]
        out, into = (torch.zeros_like(live).scatter_(1, place, True) for place in (drop, grow))
        return out, into, size.gather(1, drop)[:, 0], wish.gather(1, grow)[:, 0]

    def _tile_exchange(self, size: Tensor, wish: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, into = (x.to(mask.device) for x in _switches())
        live = _tiles(mask)
        last = torch.finfo(size.dtype).max
        size, wish = (_tiles(x).clamp(max=last / 64) for x in (size, wish))  # sums stay finite
        # an exchange is possible where both entries that die are live and both that come are dead
        possible = (live.double() @ out.T.double() == 2) & (live.double() @ into.T.double() == 0)
        cost = (size @ out.T.double()).masked_fill(~possible, last)
        choice = cost.argsort(dim=1, stable=True)[:, 0]
        gain = (wish * into[choice]).sum(1)
        return out[choice], into[choice], cost.gather(1, choice[:, None])[:, 0], gain


def violation(mask: Tensor, n: int = 2, m: int = 4, *, two_way: bool = False) -> tuple[int, int] | None:
    """(row, group) of the first group along the input that does not keep exactly `n` of `m`, or None.

    With `two_way` groups along the output count too; those are returned as (column, group).
    """
    bad = (mask.reshape(mask.shape[0], -1, m).sum(2) != n).nonzero()
    if len(bad):
        return int(bad[0, 0]), int(bad[0, 1])
    return violation(mask.T, n, m) if two_way else None


def to_semi_structured(weight: Tensor, mask: Tensor, *, name: str = "weight") -> Tensor:
    """The masked weight as torch's semi-structured (2:4) tensor.

    Args:
        weight: [out, in] on a CUDA device, 16-bit floats or int8.
        mask: [out, in], exactly 2 of 4.
        name: for the errors.

    Raises:
        ModelError: the mask is not 2:4, or torch cannot hold this tensor in that form.
    """
    where = violation(mask)
    if where is not None:
        raise ModelError(f"{name}: row {where[0]}, group {where[1]} does not keep exactly 2 of 4 entries")
    if weight.device.type != "cuda" or weight.dtype not in _DTYPES:
        raise ModelError(
            f"{name}: torch's 2:4 tensors need a CUDA device (compute capability 8.0 or later) and float16, bfloat16 "
            f"or int8, found {weight.dtype} on {weight.device.type}"
        )
    try:
        return torch.sparse.to_sparse_semi_structured((weight.detach() * mask).contiguous())
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        raise ModelError(f"{name} {list(weight.shape)}: torch cannot make a 2:4 tensor: {error}") from error
