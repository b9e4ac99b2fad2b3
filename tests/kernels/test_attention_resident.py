"""Resident attention kernels against an oracle in float64 with the gradients written out."""

import math

import pytest
import torch

from efftrain_ds.kernels.attention import resident
from efftrain_ds.kernels.attention.table import Launch

from .common import DEVICE, GPU, INTERPRETED, needs_gpu, needs_kernels, poisoned, relative_error

pytestmark = needs_kernels

CAPABILITY = torch.cuda.get_device_capability() if GPU else None
MAIN = torch.float64 if INTERPRETED else torch.bfloat16  # logic is checked exactly where float64 is possible
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 1e-2 if INTERPRETED else 4e-3,  # the interpreter truncates
}
LENGTHS = (1, 15, 16, 17, 50, 63, 64, 65, 129, 197, 208, 256)


def tokens(n, heads=2, dim=64, dtype=MAIN, batch=1, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    return (torch.randn(batch, n, heads, dim, generator=generator) * scale).to(DEVICE, dtype)


def case(n, heads=2, dim=64, dtype=MAIN, batch=1, n_k=None):
    """q, k, v and the gradient of the output."""
    sizes = (n, n_k or n, n_k or n, n)
    return [tokens(size, heads, dim, dtype, batch, seed) for seed, size in enumerate(sizes)]


def words(keep):
    """bool [Hm, nQ, nK] -> int64 [Hm, nQ], bit j = block j."""
    bits = 2 ** torch.arange(keep.shape[2], dtype=torch.int64)
    return (keep.to(torch.int64) * bits).sum(-1).to(DEVICE)


def oracle(q, k, v, dout, keep, block, scale):
    """out, lse, dq, dk, dv in float64; the token mask is made of the block mask by indexing."""
    q, k, v, dout = (x.double().transpose(1, 2) for x in (q, k, v, dout))
    s = q @ k.mT * scale
    if keep is not None:
        rows, columns = torch.arange(q.shape[2]) // block, torch.arange(k.shape[2]) // block
        s = s.masked_fill(~keep[:, rows][:, :, columns].to(s.device), -math.inf)
    top = s.amax(-1, keepdim=True).clamp_min(-1e300)
    weights = (s - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(total > 0, (top + total.log()) / math.log(2), math.inf)[..., 0]
    p = torch.where(total > 0, weights / total, 0.0)
    out = p @ v
    ds = p * (dout @ v.mT - (out * dout).sum(-1, keepdim=True))
    dq, dk, dv = ds @ k * scale, ds.mT @ q * scale, p.mT @ dout
    return [x.transpose(1, 2) if x.dim() == 4 else x for x in (out, lse, dq, dk, dv)]


def supported(q, k, backward):
    reason = resident.supports(q.shape[3], q.shape[1], k.shape[1], q.dtype, CAPABILITY, backward=backward)
    if reason is not None:
        pytest.skip(reason)


def launch_for(q, k, backward=False):
    return resident.default_launch(q.shape[3], q.shape[1], k.shape[1], CAPABILITY, backward=backward)


def forward(q, k, v, keep=None, block=16, scale=None, out=None):
    supported(q, k, False)
    out = poisoned(q) if out is None else out
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan, device=q.device)
    lse = lse.double() if q.dtype == torch.float64 else lse
    bits = None if keep is None else words(keep)
    scale = scale or q.shape[3] ** -0.5
    resident.forward(q, k, v, out, lse, bits, block, scale, launch_for(q, k))
    return out, lse


def run(q, k, v, dout, keep=None, block=16, scale=None, grads=None, launch=None):
    """out, lse, dq, dk, dv of the kernels; every buffer was full of NaN."""
    supported(q, k, True)
    out, lse = forward(q, k, v, keep, block, scale)
    dq, dk, dv = grads or (poisoned(q), poisoned(k), poisoned(v))
    bits = None if keep is None else words(keep)
    scale = scale or q.shape[3] ** -0.5
    launch = launch or launch_for(q, k, True)
    resident.backward(q, k, v, out, lse, dout, dq, dk, dv, bits, block, scale, launch)
    return out, lse, dq, dk, dv


def check(found, q, k, v, dout, keep=None, block=16, scale=None):
    wanted = oracle(q, k, v, dout, keep, block, scale or q.shape[3] ** -0.5)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=False):
        if name == "lse":
            finite = torch.isfinite(b)
            assert torch.equal(torch.isposinf(a), ~finite)
            assert ((a - b)[finite].abs() < (1e-12 if a.dtype == torch.float64 else 1e-5)).all()
        else:
            error = relative_error(a, b)
            assert error <= TOLERANCE[q.dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize(("n", "heads", "dim"), [(17, 1, 64), (37, 2, 32), (50, 1, 64), (65, 1, 32)])
def test_exact(n, heads, dim):
    inputs = case(n, heads, dim)
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    inputs = case(50, 1, 64, dtype)
    out, lse, *grads = run(*inputs, scale=0.2)
    assert lse.dtype == torch.float32
    check((out, lse, *grads), *inputs, scale=0.2)


def test_197_tokens():
    # three pieces of keys, four query tiles, the last of both partial
    inputs = case(197, 1, 64)
    check(run(*inputs), *inputs)


def test_197_tokens_masked():
    keep = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(5)) > 0.5
    keep[0, 1] = False
    inputs = case(197, 1, 32)
    check(forward(*inputs[:3], keep, 64), *inputs, keep, 64)


@pytest.mark.parametrize(("dim", "n", "n_k"), [(80, 37, 37), (96, 17, 37), (128, 17, 17)])
def test_head_dims(dim, n, n_k):
    inputs = case(n, 1, dim, n_k=n_k)
    check(forward(*inputs[:3]), *inputs)


@pytest.mark.parametrize(("n", "n_k"), [(17, 101), (65, 16), (1, 33), (33, 2)])
def test_other_number_of_keys(n, n_k):
    inputs = case(n, 1, 64, n_k=n_k)
    check(run(*inputs), *inputs)


def blocks(*kept, size=4, heads=1):
    keep = torch.zeros(heads, size, size, dtype=torch.bool)
    for head, row, column in kept:
        keep[head, row, column] = True
    return keep


def test_batch_and_heads():
    inputs = case(17, 3, 32, batch=2)
    keep = torch.tensor([[[1, 0], [1, 1]], [[0, 1], [0, 0]], [[1, 1], [0, 1]]], dtype=torch.bool)
    supported(*inputs[:2], False)
    check(forward(*inputs[:3], keep), *inputs, keep)


def test_empty_row_and_column():
    keep = torch.ones(1, 4, 4, dtype=torch.bool)
    keep[0, 1] = False
    keep[0, :, 2] = False
    inputs = case(50, 1, 64)
    out, lse, dq, dk, dv = run(*inputs, keep)
    check((out, lse, dq, dk, dv), *inputs, keep)
    assert not out[:, 16:32].any()
    assert not dq[:, 16:32].any()
    assert torch.isposinf(lse[:, :, 16:32]).all()
    assert not dk[:, 32:48].any()
    assert not dv[:, 32:48].any()


def test_pruned_head():
    keep = torch.ones(2, 3, 3, dtype=torch.bool)
    keep[1] = False
    inputs = case(37, 2, 64)
    out, lse, dq, dk, dv = run(*inputs, keep)
    check((out, lse, dq, dk, dv), *inputs, keep)
    assert torch.isposinf(lse[:, 1]).all()
    assert not any(x[:, :, 1].any() for x in (out, dq, dk, dv))


def test_all_heads_pruned():
    inputs = case(17, 2, 64)
    out, lse, dq, dk, dv = run(*inputs, torch.zeros(1, 2, 2, dtype=torch.bool))
    assert torch.isposinf(lse).all()
    assert not any(torch.isnan(x).any() or x.any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("tail", [True, False])
def test_tail_block(tail):
    # block 3 holds tokens 48 and 49 only
    keep = torch.ones(1, 4, 4, dtype=torch.bool)
    keep[0, :, 3] = tail
    keep[0, 0] = torch.tensor([False, False, False, tail])
    inputs = case(50, 1, 64)
    found = run(*inputs, keep)
    check(found, *inputs, keep)
    assert bool(found[3][:, 48:].any()) is tail


def test_diagonal():
    inputs = case(50, 1, 64)
    keep = torch.eye(4, dtype=torch.bool)[None]
    check(run(*inputs, keep), *inputs, keep)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_blocks(block):
    # blocks below, equal to and above the query tile of 64
    size = -(-65 // block)
    keep = torch.ones(1, size, size, dtype=torch.bool)
    if size > 1:
        keep[0, 0, -1] = keep[0, -1, 0] = False
    inputs = case(65, 1, 64)
    check(run(*inputs, keep, block), *inputs, keep, block)


def test_full_mask_and_shared_mask():
    inputs = case(37, 2, 64)
    full = torch.ones(1, 3, 3, dtype=torch.bool)
    for a, b in zip(run(*inputs), run(*inputs, full, launch=launch_for(*inputs[:2], True)), strict=True):
        assert relative_error(a, b) <= TOLERANCE[MAIN]
    keep = blocks((0, 0, 0), (0, 1, 2), (0, 2, 1), size=3)
    for a, b in zip(run(*inputs, keep), run(*inputs, keep.repeat(2, 1, 1)), strict=True):
        assert torch.equal(a, b)


def test_strides():
    """Packed, [B, H, N, D] and [N, B, H, D] storage give the bits of contiguous tensors, and fill nothing else."""
    inputs = case(17, 2, 64, batch=2)
    expected = run(*inputs)
    qkv = torch.stack(inputs[:3], 2)
    dqkv = poisoned(qkv)
    found = run(*qkv.unbind(2), inputs[3], grads=dqkv.unbind(2))
    assert not torch.isnan(dqkv).any()
    for order in ((0, 2, 1, 3), (1, 0, 2, 3)):
        back = [order.index(i) for i in range(4)]
        moved = [x.permute(order).contiguous().permute(back) for x in inputs]
        assert not moved[0].is_contiguous()
        for a, b in zip(run(*moved, grads=[poisoned(x) for x in moved[:3]]), expected, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_32_bits():
    # rows 2^27 elements apart: offsets pass 2^31 inside one head; only touched pages of the storage exist on the CPU
    n, dim, step = 17, 64, 2**27
    if GPU and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    inputs = case(n, 1, dim, torch.float16)
    storage = torch.empty((n - 1) * step + 8 * dim, dtype=torch.float16, device=DEVICE)
    far = [storage.as_strided((1, n, 1, dim), (8 * dim, step, dim, 1), i * dim) for i in range(7)]
    for view, x in zip(far, inputs, strict=False):
        view.copy_(x)
    expected = run(*inputs)
    for a, b in zip(run(*far[:4], grads=far[4:]), expected, strict=True):
        assert torch.equal(a, b)


def test_repeats_are_bitwise_equal():
    inputs = case(17, 1, 64, torch.float16)
    keep = torch.tensor([[[1, 1], [0, 1]]], dtype=torch.bool)
    first = run(*inputs, keep)
    for _ in range(4):
        for a, b in zip(run(*inputs, keep), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scores(sign):
    """All scores near +-700 (base 2: +-1000): exp2 of a score alone, or of 0 - lse at absent keys, would overflow."""
    dtype = torch.float32 if INTERPRETED else torch.float16
    q, k, v, dout = case(17, 1, 64, dtype)
    q = torch.full_like(q, 3.0) + q / 256
    k = torch.full_like(k, sign * 29.25) + k / 256
    out, lse, dq, dk, dv = run(q, k, v, dout)
    assert (lse.abs() > 900).all()
    wanted = oracle(q, k, v, dout, None, 16, 0.125)
    for a, b in zip((out, dq, dk, dv), (wanted[0], *wanted[2:]), strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()  # scores of 700 have few digits left
    assert (lse - wanted[1]).abs().max() < 1e-3


@pytest.mark.parametrize("tile", [16, 64])
def test_key_tiles(tile):
    if GPU:
        pytest.skip("other tiles than the default are for the tuner on a GPU")
    inputs = case(50, 1, 64)
    check(run(*inputs, launch=Launch("resident", tile=tile)), *inputs)
    keep = torch.eye(2, dtype=torch.bool)[None]
    check(run(*inputs, keep, 32, launch=Launch("resident", tile=tile)), *inputs, keep, 32)


def test_key_pieces_hold_all_keys():
    for n in range(1, 257):
        pieces = resident.key_pieces(n)
        present = [size for size in pieces if size]
        assert sum(pieces) >= n
        assert sum(present[:-1]) < n, f"{n}: {pieces}, only the last piece may be partial"
        assert sorted(pieces, reverse=True) == list(pieces)
        assert all(size in (16, 32, 64, 128) for size in present)
        assert sum(pieces) - n < 32, (n, pieces)
    assert resident.key_pieces(197) == (128, 64, 16)


def test_supports_names_the_reason():
    def reason(dim, n, capability, backward=False, dtype=torch.bfloat16, n_k=None):
        return resident.supports(dim, n, n_k or n, dtype, capability, backward=backward)

    hopper, ampere, ada = (9, 0), (8, 0), (8, 9)
    for dim, n, capability, backward in (
        (64, 256, hopper, False),
        (64, 256, hopper, True),
        (80, 224, hopper, False),
        (128, 197, hopper, True),
        (32, 197, ampere, True),
        (64, 197, ampere, True),
        (64, 128, ada, True),
        (96, 256, None, False),
    ):
        assert reason(dim, n, capability, backward) is None
    assert reason(80, 197, hopper, dtype=torch.float16, n_k=49) is None
    assert reason(64, 64, None, True, torch.float32) is None
    assert "256 tokens, found 257" in reason(64, 257, hopper)
    assert "head dims 32, 64, 80, 128 on sm_90, found 72" in reason(72, 64, hopper)
    assert "found torch.float32" in reason(64, 64, hopper, dtype=torch.float32)
    assert "head dims 64, 128 on sm_90, found 80" in reason(80, 64, hopper, True)
    assert "found 32" in reason(32, 64, hopper, True)
    assert "up to 224 keys" in reason(80, 225, hopper)
    assert "up to 128 queries" in reason(64, 129, ada, True)
    assert "found 128" in reason(128, 64, ampere)
    assert "found 10.0" in reason(64, 64, (10, 0))
    for n in (128, 129):  # Blackwell for workstations has Ada's memory
        assert (reason(64, n, (12, 0), True) is None) is (reason(64, n, ada, True) is None)
    for shape in ((64, 197, 197), (32, 197, 197), (64, 50, 50)):
        for backward in (False, True):
            launches = [resident.default_launch(*shape, version, backward=backward) for version in ((12, 0), ada)]
            assert launches[0] == launches[1]
    assert "7.5" in reason(64, 64, (7, 5))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_lengths_on_a_gpu(n, dim, dtype, masked):
    inputs = case(n, 3, dim, dtype, batch=2)
    size = -(-n // 64)
    keep = None
    if masked:
        keep = torch.rand(3, size, size, generator=torch.Generator().manual_seed(n)) > 0.4
    check(forward(*inputs[:3], keep, 64), *inputs, keep, 64)
    check(run(*inputs, keep, 64), *inputs, keep, 64)


@needs_gpu
def test_sharp_softmax():
    q, k, v, dout = case(197, 3, 64, torch.bfloat16, batch=2)
    q = q * 6
    keep = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    found, wanted = run(q, k, v, dout, keep, 64), oracle(q, k, v, dout, keep, 64, 0.125)
    for i in (0, 2, 3, 4):
        assert relative_error(found[i], wanted[i]) <= 8e-3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_no_worse_than_sdpa(dtype, masked):
    q, k, v, dout = case(197, 4, 64, dtype, batch=2)
    keep = tokenwise = None
    if masked:
        keep = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2)) > 0.4
        keep |= torch.eye(4, dtype=torch.bool)
        tokenwise = keep.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :197, :197].to(DEVICE)
    ours, wanted = run(q, k, v, dout, keep, 64), oracle(q, k, v, dout, keep, 64, 0.125)
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=tokenwise)
    theirs = (out, *torch.autograd.grad(out, leaves, dout.transpose(1, 2)))
    for i, x in zip((0, 2, 3, 4), theirs, strict=True):
        assert relative_error(ours[i], wanted[i]) <= 1.5 * relative_error(x.transpose(1, 2), wanted[i])


@needs_gpu
def test_many_programs():
    q, k, v, dout = (x.expand(12000, -1, 6, -1) for x in case(17, 1, 64, torch.bfloat16))
    for x, expected in zip(
        run(q, k, v, dout), run(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], dout[:1, :, :1]), strict=True
    ):
        assert torch.equal(x[-1:, :, -1:] if x.dim() == 4 else x[-1:, -1:], expected)
        assert not torch.isnan(x).any()
