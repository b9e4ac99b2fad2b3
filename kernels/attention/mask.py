"""Block masks: which blocks of keys each block of queries sees, as device tensors of fixed shape.

The boolean `BlockMask.keep` is the whole state. The lists that the kernels walk are derived from it on its device, and
an update rewrites all of them in place: same shapes, same addresses, no host sync. So compiled code and captured graphs
stay valid over any number of updates.

Shape legend: Hm heads of the mask (1 for all heads alike, or H), Nq queries, Nk keys, nQ = ceil(Nq / block),
nK = ceil(Nk / block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

BLOCKS = (16, 32, 64, 128)
BITS = 64  # key blocks that fit in `row_bits`


class BlockLists(NamedTuple):
    """Kept blocks by rows and by columns, see `BlockMask` for shapes and dtypes."""

    row_cnt: Tensor
    row_idx: Tensor
    col_cnt: Tensor
    col_idx: Tensor
    row_bits: Tensor


def block_lists(keep: Tensor) -> BlockLists:
    """Lists of the kept blocks of `keep` (bool [Hm, nQ, nK]), on its device and without a host sync.

    A stable sort of the negated mask puts the kept indices first and ascending, and the others behind them, so every
    entry is a valid block index whatever the count says.
    """
    row_cnt, row_idx = _ordered(keep)
    col_cnt, col_idx = _ordered(keep.transpose(1, 2))
    if keep.shape[2] <= BITS:
        bit = torch.arange(keep.shape[2], device=keep.device)
        row_bits = (keep.long() << bit).sum(-1)  # bit 63 is the sign: kernels shift and mask, they never compare
    else:
        row_bits = keep.new_zeros(keep.shape[:2], dtype=torch.int64)
    return BlockLists(row_cnt, row_idx, col_cnt, col_idx, row_bits)


def _ordered(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and padded index lists along the last dimension, int32."""
    order = keep.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int32, memory_format=torch.contiguous_format)


def num_blocks(length: int, block: int) -> int:
    """Blocks of `block` tokens that `length` tokens need; the last may be ragged."""
    return -(-length // block)


class BlockMask(nn.Module):
    """Block-sparse attention mask, the same for every image of a batch.

    Only `keep` is in the state dict. Loading it rebuilds the lists; `to(device)` moves everything.

    Buffers:
        keep: bool [Hm, nQ, nK], True where a block of queries sees a block of keys.
        row_cnt: int32 [Hm, nQ], kept key blocks of a query block.
        row_idx: int32 [Hm, nQ, nK], their indices ascending, then the indices of the others.
        col_cnt: int32 [Hm, nK], query blocks that see a key block.
        col_idx: int32 [Hm, nK, nQ], their indices ascending, then the others.
        row_bits: int64 [Hm, nQ], bit j set where key block j is kept; zeros where nK > 64.

    Attributes:
        q_len: queries Nq.
        kv_len: keys Nk.
        block: tokens of a block, in queries and in keys.
    """

    keep: Tensor
    row_cnt: Tensor
    row_idx: Tensor
    col_cnt: Tensor
    col_idx: Tensor
    row_bits: Tensor

    def __init__(self, keep: Tensor, q_len: int, kv_len: int, block: int = 64) -> None:
        """Copy `keep` and build its lists.

        Args:
            keep: bool [Hm, nQ, nK] on the device of the attention's inputs.
            q_len: queries Nq, at least 1.
            kv_len: keys Nk, at least 1.
            block: 16, 32, 64 or 128.

        Raises:
            ValueError: a wrong dtype, block size or length, or block counts that do not fit the lengths.
        """
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block mask: block is {_one_of(BLOCKS)} tokens, found {block!r}")
        for name, length in (("q_len", q_len), ("kv_len", kv_len)):
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise ValueError(f"block mask: {name} is an integer >= 1, found {length!r}")
        self.q_len, self.kv_len, self.block = q_len, kv_len, block
        problem = self._problem(keep)
        if problem is not None:
            raise ValueError(problem)
        self.register_buffer("keep", keep.detach().clone(memory_format=torch.contiguous_format))
        for name, value in block_lists(self.keep)._asdict().items():
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def full(
        cls, heads: int, q_len: int, kv_len: int, block: int = 64, device: torch.device | str | None = None
    ) -> BlockMask:
        """A mask that keeps everything; arguments as of the constructor, `heads` is Hm."""
        shape = (heads, num_blocks(q_len, block), num_blocks(kv_len, block))
        return cls(torch.ones(shape, dtype=torch.bool, device=device), q_len, kv_len, block)

    @torch.no_grad()
    def update_(self, keep: Tensor) -> BlockMask:
        """Change the mask in place: `keep` and every list keep their shapes and addresses. No host sync.

        Args:
            keep: bool [Hm, nQ, nK], of the shape and on the device of the present mask.

        Raises:
            ValueError: another dtype, shape or device.
        """
        problem = self._problem(keep, self.num_heads, self.keep.device)
        if problem is not None:
            raise ValueError(problem)
        self.keep.copy_(keep)
        self._rebuild()
        return self

    @property
    def num_heads(self) -> int:
        """Hm: heads of the mask, 1 where all heads share it."""
        return self.keep.shape[0]

    @property
    def density(self) -> float:
        """Share of the blocks that are kept, 0 to 1.

        Read from the device every time (a host sync), because buffers also change without this class: by a rebuild of
        the engine, a checkpoint, a replayed graph. Ask outside of compiled code, and not in every step.
        """
        kept = self._counts()
        return sum(kept) / (len(kept) * self.keep.shape[1] * self.keep.shape[2])

    @property
    def head_types(self) -> tuple[str, ...]:
        """Per head of the mask "dense" (all blocks kept), "sparse" or "pruned" (none); syncs as `density` does."""
        blocks = self.keep.shape[1] * self.keep.shape[2]
        return tuple("dense" if n == blocks else "sparse" if n else "pruned" for n in self._counts())

    def check(self, num_heads: int, q_len: int, kv_len: int, device: torch.device) -> None:
        """Compare the mask with the inputs of an attention; host work only.

        Raises:
            ValueError: another number of heads, length or device.
        """
        if self.num_heads not in (1, num_heads):
            raise ValueError(f"block mask: made for {self.num_heads} heads, the input has {num_heads}; 1 fits all")
        if (q_len, kv_len) != (self.q_len, self.kv_len):
            raise ValueError(
                f"block mask: made for {self.q_len} queries and {self.kv_len} keys, the input has {q_len} and {kv_len}"
            )
        if device != self.keep.device:
            raise ValueError(f"block mask: is on {self.keep.device}, the input on {device}; move one of them")

    def to_dense(self) -> Tensor:
        """The mask of single tokens, bool [Hm, q_len, kv_len]."""
        dense = self.keep.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        return dense[:, : self.q_len, : self.kv_len]

    def to_flex(self) -> FlexBlockMask:
        """FlexAttention's block mask of the present state: a copy, convert again after an update.

        Whole blocks are full ones, which skip the mask function; the ragged last row and column are partial ones. The
        function looks `keep` up, so that the result is right where only the function is used (eager mode, CPU).
        Its batch dimension is 1, its head dimension Hm.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        keep = self.keep.clone()
        rows = torch.arange(1, keep.shape[1] + 1, device=keep.device) * self.block <= self.q_len
        columns = torch.arange(1, keep.shape[2] + 1, device=keep.device) * self.block <= self.kv_len
        whole = rows[:, None] & columns
        partial_count, partial_index = _ordered((keep & ~whole)[None])
        full_count, full_index = _ordered((keep & whole)[None])
        return FlexBlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=(self.block, self.block),
            mask_mod=_lookup(keep, self.block),
            seq_lengths=(self.q_len, self.kv_len),
        )

    @classmethod
    def from_flex(cls, flex: FlexBlockMask, *, partial: str = "exact") -> BlockMask:
        """Take over a block mask of FlexAttention; syncs with the host.

        Args:
            flex: a mask with batch dimension 1 and square blocks.
            partial: what becomes of blocks that the mask function may cut inside. "exact": the function is evaluated
                for all pairs of tokens, and a block that it cuts is an error (one that it empties is dropped).
                "keep": such blocks are kept whole, which lets through more than the original.

        Raises:
            ValueError: a batch dimension above 1, other block sizes, or a block that is cut inside.
        """
        from torch.nn.attention.flex_attention import create_mask

        if partial not in ("exact", "keep"):
            raise ValueError(f'block mask: partial is "exact" or "keep", found {partial!r}')
        if flex.BLOCK_SIZE[0] != flex.BLOCK_SIZE[1] or flex.BLOCK_SIZE[0] not in BLOCKS:
            raise ValueError(
                f"block mask: FlexAttention's mask has blocks of {flex.BLOCK_SIZE[0]} queries x {flex.BLOCK_SIZE[1]} "
                f"keys, allowed are squares of {_one_of(BLOCKS)}"
            )
        batch, heads = flex.kv_num_blocks.shape[:2] if flex.kv_num_blocks.dim() == 3 else (0, 0)
        if batch != 1:
            raise ValueError(
                "block mask: FlexAttention's mask must be one for all images and have the dimensions (1, heads), "
                f"found {tuple(flex.kv_num_blocks.shape[:-1])}"
            )
        block, (q_len, kv_len) = flex.BLOCK_SIZE[0], flex.seq_lengths
        columns = num_blocks(kv_len, block)
        keep = _scattered(flex.kv_num_blocks[0], flex.kv_indices[0], columns)
        full = torch.zeros_like(keep)
        if flex.full_kv_num_blocks is not None:
            full = _scattered(flex.full_kv_num_blocks[0], flex.full_kv_indices[0], columns)
        if partial == "exact":
            seen = create_mask(flex.mask_mod, 1, heads, q_len, kv_len, device=keep.device)[0]
            count = torch.nn.functional.pad(seen, (0, columns * block - kv_len, 0, keep.shape[1] * block - q_len))
            count = count.view(heads, keep.shape[1], block, columns, block).sum((2, 4))
            sizes = [
                (torch.arange(n, device=keep.device) * -block + length).clamp(max=block)
                for n, length in ((keep.shape[1], q_len), (columns, kv_len))
            ]
            cut = keep & ~full & (count > 0) & (count < torch.outer(*sizes))
            if cut.any():
                where = tuple(cut.nonzero()[0].tolist())
                raise ValueError(
                    f"block mask: block (head, query block, key block) {where} and {int(cut.sum()) - 1} more are cut "
                    'by the mask function; only whole blocks can be kept or left out (partial="keep" keeps them whole)'
                )
            keep = keep & (count > 0)
        return cls(keep | full, q_len, kv_len, block)

    def extra_repr(self) -> str:
        """Sizes, without a host sync."""
        return f"heads={self.num_heads}, q_len={self.q_len}, kv_len={self.kv_len}, block={self.block}"

    def _problem(self, keep: Tensor, heads: int | None = None, device: torch.device | None = None) -> str | None:
        """What is wrong with a `keep` for this mask (for so many heads, for this device); None if nothing."""
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            return f"block mask: keep is a bool tensor, found {getattr(keep, 'dtype', type(keep).__name__)}"
        rows, columns = num_blocks(self.q_len, self.block), num_blocks(self.kv_len, self.block)
        fits = keep.dim() == 3 and keep.shape[1:] == (rows, columns) and keep.shape[0] > 0
        if not fits or heads not in (None, keep.shape[0]):
            return (
                f"block mask: keep has shape {tuple(keep.shape)}, allowed is ({heads or 'heads'}, {rows}, {columns}): "
                f"{self.q_len} queries and {self.kv_len} keys in blocks of {self.block}"
            )
        if device not in (None, keep.device):
            return f"block mask: keep is on {keep.device}, the mask on {device}; move it there first"
        return None

    @torch.no_grad()
    def _rebuild(self) -> None:
        for name, value in block_lists(self.keep)._asdict().items():
            getattr(self, name).copy_(value)

    def _counts(self) -> tuple[int, ...]:
        """Kept blocks per head, on the host."""
        return tuple(self.row_cnt.sum(1).tolist())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(prefix + "keep")
        problem = None if saved is None else self._problem(saved, self.num_heads)
        if problem is not None:
            error_msgs.append(f"{prefix}keep: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if saved is None:
            return
        if self.row_cnt.device != self.keep.device:  # a mask of meta tensors took the loaded one (assign=True)
            for name, value in block_lists(self.keep)._asdict().items():
                setattr(self, name, value)
        self._rebuild()


def _one_of(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"


def _lookup(keep: Tensor, block: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function that reads `keep`; made by one factory, so that new masks do not recompile."""
    if keep.shape[0] == 1:  # the head index runs over the input's heads

        def shared(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return keep[0, q_idx // block, kv_idx // block]

        return shared

    def per_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return keep[h, q_idx // block, kv_idx // block]

    return per_head


def _scattered(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """bool [..., columns] from counts [...] and padded lists [..., n] whose entries past the count mean nothing."""
    valid = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    keep = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    keep.scatter_(-1, torch.where(valid, index.long(), columns), True)
    return keep[..., :columns]
