import math
from functools import lru_cache

import pytest
import torch

from efftrain_ds.kernels.attention import lists
from efftrain_ds.kernels.attention.mask import block_lists
from efftrain_ds.kernels.attention.reference import attention_reference
from efftrain_ds.kernels.attention.table import Launch, lookup

from .common import DEVICE, GPU, INTERPRETED, needs_gpu, needs_kernels, poisoned, relative_error

pytestmark = needs_kernels
LAUNCH = Launch("list", num_warps=4, num_stages=2)
EXACT = torch.float64 if INTERPRETED else torch.float32  # compiled kernels have no float64
# the interpreter truncates where a GPU rounds to bf16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3 if GPU else 1e-2}


def random(*shape, dtype, seed):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def inputs(b, q_len, kv_len, heads, dim, dtype=EXACT):
    """q, k, v and the gradient of the output."""
    return [random(b, n, heads, dim, dtype=dtype, seed=i) for i, n in enumerate((q_len, kv_len, kv_len, q_len))]


def blocks(length, block):
    return -(-length // block)


def random_keep(heads, q_len, kv_len, block, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, blocks(q_len, block), blocks(kv_len, block), generator=generator) < share


def run(q, k, v, dout, keep, block, scale=None, launch=LAUNCH):
    """out, lse, dq, dk, dv of the kernels, in poisoned buffers; keep None: without lists; launch: one, or two."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    assert lists.supports(q, k, v, block, scale) is None
    row_cnt, row_idx, col_cnt, col_idx = (None,) * 4 if keep is None else block_lists(keep.to(DEVICE))[:4]
    wide = torch.promote_types(q.dtype, torch.float32)
    out, dq, dk, dv = (poisoned(x) for x in (q, q, k, v))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan, dtype=wide, device=DEVICE)
    first, second = launch if isinstance(launch, tuple) else (launch, launch)
    lists.forward(q, k, v, out, lse, row_cnt, row_idx, block, scale, first)
    lists.backward(q, k, v, out, lse, dout, dq, dk, dv, row_cnt, row_idx, col_cnt, col_idx, block, scale, second)
    return out, lse, dq, dk, dv


def dense(keep, block, q_len, kv_len):
    return keep.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :q_len, :kv_len].to(DEVICE)


def expected(q, k, v, dout, keep, block, scale=None):
    """The same in float64 by plain torch, with a dense mask."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    mask = None if keep is None else dense(keep, block, q.shape[1], k.shape[1])
    out, lse = attention_reference(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    return out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout.double())


def check(q, k, v, dout, keep, block, scale=None, tolerance=None, launch=LAUNCH):
    found = run(q, k, v, dout, keep, block, scale, launch)
    wanted = expected(q, k, v, dout, keep, block, scale)
    tolerance = tolerance or TOLERANCE[q.dtype]
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert x.shape == y.shape, name
        if name == "lse":
            # a bf16 or fp16 input is exact in both: only the sums differ
            torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-12 if x.dtype == torch.float64 else 1e-5)
        else:
            assert x.dtype == q.dtype
            assert relative_error(x, y) <= tolerance, name
            assert not x[y == 0].any(), f"{name}: zeros are exact"
    return found


@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "dim", "block", "tile", "mask_heads"),
    [
        (17, 17, 2, 32, 16, 16, 2),
        (20, 50, 1, 80, 16, 64, 1),
        (50, 37, 1, 64, 32, 64, 1),
        (37, 50, 1, 48, 32, 16, 1),  # a block in two steps, the partial ones with one and two
        (50, 65, 1, 16, 16, 16, 1),
        (65, 65, 1, 64, 64, 32, 1),
        (65, 129, 1, 128, 64, 64, 1),
        (130, 20, 2, 32, 128, 64, 2),
        (32, 48, 1, 32, 16, 16, 1),
    ],
)
def test_logic(q_len, kv_len, heads, dim, block, tile, mask_heads):
    keep = random_keep(mask_heads, q_len, kv_len, block, share=0.6)
    keep[0, -1, -1] = True
    launch = Launch("list", num_warps=4, num_stages=2, tile=tile)
    check(*inputs(1, q_len, kv_len, heads, dim), keep, block, launch=launch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype):
    keep = random_keep(1, 37, 50, 16, share=0.7)
    check(*inputs(1, 37, 50, 1, 32, dtype), keep, 16)


def test_precision_in_two_parts():
    check(*inputs(1, 18, 20, 1, 80, torch.float16), random_keep(1, 18, 20, 16, share=0.8), 16)


def patterns():
    n = 3  # 34 tokens in blocks of 16, the last with 2
    full = torch.ones(2, n, n, dtype=torch.bool)
    diagonal = torch.eye(n, dtype=torch.bool)[None]
    row, column, pruned, no_tail, only_tail = (full.clone() for _ in range(5))
    row[:, 1:] = False
    row[1, 0] = False
    row[1, 2] = True
    column[:, :, :2] = False
    column[:, 1] = False
    pruned[1] = False
    pruned[0] = diagonal
    no_tail[:, :, 2] = False
    no_tail[:, 2] = False
    no_tail[0] &= diagonal[0]
    only_tail[:, :, :2] = False
    return {
        "diagonal": diagonal,
        "empty rows": row,
        "empty columns and a row": column,
        "a pruned head": pruned,
        "all heads pruned": full & False,
        "no tail": no_tail,
        "only the tail": only_tail,
    }


@pytest.mark.parametrize("name", patterns())
def test_patterns(name):
    keep = patterns()[name]
    out, lse, dq, dk, dv = check(*inputs(1, 34, 34, 2, 16), keep, 16)
    rows = dense(keep, 16, 34, 34).any(-1).expand(2, -1)
    columns = dense(keep, 16, 34, 34).any(1).expand(2, -1)
    assert torch.equal(lse[0] == math.inf, ~rows)
    for x, live in ((out, rows), (dq, rows), (dk, columns), (dv, columns)):
        dead = x[0].transpose(0, 1)[~live]
        assert torch.equal(dead, torch.zeros_like(dead))


def test_full_mask_is_no_mask():
    q, k, v, dout = inputs(1, 17, 34, 1, 16)
    found = check(q, k, v, dout, None, 16)
    listed = run(q, k, v, dout, torch.ones(1, 2, 3, dtype=torch.bool), 16)
    for x, y in zip(found, listed, strict=True):
        assert torch.equal(x, y)


def test_one_mask_for_all_heads():
    tensors, keep = inputs(1, 18, 20, 2, 16), torch.tensor([[[True, False], [True, True]]])
    for x, y in zip(run(*tensors, keep, 16), run(*tensors, keep.expand(2, -1, -1), 16), strict=True):
        assert torch.equal(x, y)


def test_images_and_heads_are_apart():
    q, k, v, dout = inputs(2, 9, 18, 2, 16)
    keep = torch.tensor([[[True, False]], [[True, True]]])
    found = check(q, k, v, dout, keep, 16)
    part = [x[1:, :, 1:].contiguous() for x in (q, k, v, dout)]
    for x, y in zip(found, run(*part, keep[1:], 16), strict=True):
        assert torch.equal(x[1:, 1:] if x is found[1] else x[1:, :, 1:], y)


def laid_out(kind, q, k, v):
    """Buffers of one layout, NaN beside the values where there is a beside."""
    if kind == "packed":
        return torch.stack((q, k, v), 2).unbind(2)
    if kind == "heads first":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    if kind == "images in the middle":
        return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    wide = [torch.full((*x.shape[:3], 3 * x.shape[3]), math.nan, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for x, y in zip(wide, (q, k, v), strict=True):
        x[..., 5 : 5 + y.shape[3]] = y
    return [x[..., 5 : 5 + y.shape[3]] for x, y in zip(wide, (q, k, v), strict=True)]


@lru_cache(maxsize=1)
def contiguous_case():
    tensors = inputs(2, 18, 18, 2, 16)
    keep = torch.tensor([[[False, True], [False, False]], [[False, False], [True, False]]])
    return *tensors, keep, run(*tensors, keep, 16)


@pytest.mark.parametrize("kind", ["packed", "heads first", "images in the middle", "inside a wider buffer"])
def test_strides(kind):
    q, k, v, dout, keep, wanted = contiguous_case()
    views = laid_out(kind, q, k, v)
    gradients = laid_out(kind, *(poisoned(x) for x in (q, k, v)))
    out, dout = (laid_out(kind, x, x, x)[1] for x in (poisoned(q), dout))
    lse = poisoned(wanted[1])
    row_cnt, row_idx, col_cnt, col_idx = block_lists(keep.to(DEVICE))[:4]
    assert lists.supports(*views, 16, 0.25) is None
    lists.forward(*views, out, lse, row_cnt, row_idx, 16, 0.25, LAUNCH)
    lists.backward(*views, out, lse, dout, *gradients, row_cnt, row_idx, col_cnt, col_idx, 16, 0.25, LAUNCH)
    for x, y in zip((out, lse, *gradients), wanted, strict=True):
        assert torch.equal(x, y)


def test_entries_behind_the_count_are_not_used():
    q, k, v, dout = inputs(1, 34, 34, 1, 16)
    keep = torch.eye(3, dtype=torch.bool)[None]
    keep[0, 1] = False
    wanted = run(q, k, v, dout, keep, 16)
    row_cnt, row_idx, col_cnt, col_idx = (x.clone() for x in block_lists(keep.to(DEVICE))[:4])
    for count, index in ((row_cnt, row_idx), (col_cnt, col_idx)):
        index[torch.arange(3, device=DEVICE) >= count[..., None]] = 2  # the partial block
    out, lse, dq, dk, dv = (poisoned(x) for x in wanted)
    lists.forward(q, k, v, out, lse, row_cnt, row_idx, 16, 0.25, LAUNCH)
    lists.backward(q, k, v, out, lse, dout, dq, dk, dv, row_cnt, row_idx, col_cnt, col_idx, 16, 0.25, LAUNCH)
    for x, y in zip((out, lse, dq, dk, dv), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_large_scores():
    # a log-sum-exp so negative that exp2 of its negative overflows: a score of 0 beyond the last key would give inf
    q, k, v, dout = inputs(1, 18, 18, 1, 16)
    k[..., 0] += 60
    q[..., 0] -= 60
    keep = torch.ones(1, 2, 2, dtype=torch.bool)
    found, wanted = run(q, k, v, dout, keep, 16), expected(q, k, v, dout, keep, 16)
    assert (found[1] < -1100).any()
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) <= (1e-11 if x.dtype == torch.float64 else 2e-3)


def test_repeats_are_bitwise_equal():
    tensors, keep = inputs(1, 16, 34, 1, 16, torch.float16), torch.tensor([[[True, False, True]]])
    first = run(*tensors, keep, 16)
    for _ in range(4):
        for x, y in zip(first, run(*tensors, keep, 16), strict=True):
            assert torch.equal(x, y)


def test_nothing_to_do():
    for b, q_len, kv_len in ((0, 20, 20), (2, 0, 20), (1, 20, 0)):
        out, lse, dq, dk, dv = run(*inputs(b, q_len, kv_len, 2, 16), None, 16)
        for x in (out, dq, dk, dv):
            assert torch.equal(x, torch.zeros_like(x))
        assert (lse == math.inf).all()


def test_supports():
    q, k, v, _ = inputs(1, 8, 8, 1, 32)
    assert lists.supports(q, k, v, 64, 0.1) is None
    assert "blocks of 48" in lists.supports(q, k, v, 48, 0.1)
    assert "scale 0" in lists.supports(q, k, v, 64, 0)
    assert "head dim 31" in lists.supports(q[..., :31], k, v, 64, 0.1)
    assert "dtype torch.int8" in lists.supports(q.to(torch.int8), k, v, 64, 0.1)
    assert "k is torch.float16" in lists.supports(q, k.half(), v, 64, 0.1)
    assert "v has a head dim of stride 8" in lists.supports(
        q, k, v.transpose(1, 3).contiguous().transpose(1, 3), 64, 0.1
    )
    far = torch.empty(32, dtype=q.dtype, device=DEVICE).as_strided((1, 1, 1, 32), (0, 2**25, 0, 1))
    assert "2^31" in lists.supports(far, k, v, 64, 0.1)
    assert lists.supports(far, k, v, 16, 0.1) is None
    many = torch.empty(32, dtype=q.dtype, device=DEVICE).as_strided((2**29, 64, 1, 32), (0, 0, 0, 1))
    assert "more tiles" in lists.supports(many, many, many, 16, 0.1)
    assert lists.supports(many, many, many, 32, 0.1) is None


def test_tail_width():
    assert [lists.tail_width(n, 64) for n in (64, 65, 80, 81, 96, 97, 127, 128)] == [0, 16, 16, 32, 32, 64, 64, 0]
    assert [lists.tail_width(n, 16) for n in (1, 15, 16, 17)] == [16, 16, 0, 16]
    assert lists.tail_width(577, 64) == lists.tail_width(1025, 64) == 16


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 63, 64, 65, 129, 197, 208, 256, 257, 577, 1025, 1600])
def test_lengths(length, dim, dtype):
    keep = random_keep(3, length, length, 64)
    keep[:, :, -1] = True
    check(*inputs(2, length, length, 3, dim, dtype), keep, 64, launch=shipped(dtype, dim))


def shipped(dtype, dim):
    """The forward and the backward launch that the table has for long masked sequences on this GPU."""
    if GPU and (reason := lists.too_large(torch.cuda.get_device_capability(), dtype, dim, 64)) is not None:
        pytest.skip(f"no kernels for {reason}")
    entry = lookup(torch.device(DEVICE), dtype, dim, 577, 577, sparse=True)
    return entry.forward, entry.backward


@needs_gpu
def test_long_keys():
    check(*inputs(1, 70, 3000, 2, 64, torch.bfloat16), random_keep(2, 70, 3000, 64, share=0.2), 64)
    check(*inputs(1, 3000, 70, 2, 64, torch.bfloat16), random_keep(2, 3000, 70, 64), 64)


@needs_gpu
def test_tf32():
    q, k, v, dout = inputs(1, 257, 257, 2, 64, torch.float32)
    found = run(q, k, v, dout, None, 64, launch=Launch("list", num_warps=8, num_stages=2, precision="tf32"))
    for x, y in zip(found, expected(q, k, v, dout, None, 64), strict=True):
        assert relative_error(x, y) <= 2e-3


def test_197_tokens():
    keep = random_keep(1, 197, 197, 64)
    keep[0, -1, -1] = True
    check(*inputs(1, 197, 197, 1, 32), keep, 64)


@needs_gpu
def test_sharp_softmax():
    q, k, v, dout = inputs(2, 257, 257, 4, 64, torch.bfloat16)
    q = q * 6
    keep = random_keep(4, 257, 257, 64)
    found, wanted = run(q, k, v, dout, keep, 64), expected(q, k, v, dout, keep, 64)
    for i in (0, 2, 3, 4):
        assert relative_error(found[i], wanted[i]) <= 8e-3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_sdpa(dtype):
    q, k, v, dout = inputs(2, 257, 257, 4, 64, dtype)
    keep = random_keep(4, 257, 257, 64)
    keep |= torch.eye(5, dtype=torch.bool)
    ours = run(q, k, v, dout, keep, 64)
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=dense(keep, 64, 257, 257))
    gradients = torch.autograd.grad(out, leaves, dout.transpose(1, 2))
    wanted = expected(q, k, v, dout, keep, 64)
    for i, x in zip((0, 2, 3, 4), (out, *gradients), strict=True):
        assert relative_error(ours[i], wanted[i]) <= 1.5 * relative_error(x.transpose(1, 2), wanted[i])


@needs_gpu
def test_more_heads_than_a_second_grid_axis_takes():
    q, k, v, dout = inputs(4099, 17, 17, 16, 32, torch.float16)
    keep = random_keep(16, 17, 17, 16)
    found = run(q, k, v, dout, keep, 16)
    for part in (slice(0, 1), slice(4098, 4099)):
        wanted = expected(q[part], k[part], v[part], dout[part], keep, 16)
        for i in (0, 2, 3, 4):
            assert relative_error(found[i][part], wanted[i]) <= TOLERANCE[torch.float16]


@needs_gpu
def test_offsets_beyond_32_bits():
    # two images 2^31 + 2^20 elements apart, in one buffer of 4 GiB for inputs and one for gradients
    shape, apart = (2, 65, 3, 1, 64), 2**31 + 2**20
    strides = (apart, 3 * 64, 64, 64, 1)
    small = random(*shape, dtype=torch.bfloat16, seed=0)
    far, gradient = (torch.empty(apart + 65 * 3 * 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    far, gradient = (x.as_strided(shape, strides) for x in (far, gradient))
    far.copy_(small)
    gradient.fill_(math.nan)
    dout = random(2, 65, 1, 64, dtype=torch.bfloat16, seed=1)
    keep = torch.ones(1, 2, 2, dtype=torch.bool)
    wanted = run(*small.unbind(2), dout, keep, 64)
    row_cnt, row_idx, col_cnt, col_idx = block_lists(keep.to(DEVICE))[:4]
    out, lse = poisoned(wanted[0]), poisoned(wanted[1])
    lists.forward(*far.unbind(2), out, lse, row_cnt, row_idx, 64, 0.125, LAUNCH)
    lists.backward(
        *far.unbind(2), out, lse, dout, *gradient.unbind(2), row_cnt, row_idx, col_cnt, col_idx, 64, 0.125, LAUNCH
    )
    for x, y in zip((out, lse, *gradient.unbind(2)), wanted, strict=True):
        assert torch.equal(x, y)


def test_fp32_that_no_gpu_of_a_kind_has_shared_memory_for_is_refused() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    assert lists.too_large((8, 9), fp32, 128, 16) is not None  # not even the smallest blocks
    assert "blocks up to 64" in (lists.too_large((8, 6), fp32, 80, 128) or "")
    assert lists.too_large((8, 0), fp32, 128, 128) is not None
    for fits in [
        ((8, 0), fp32, 128, 64),
        ((8, 9), fp32, 80, 64),
        ((8, 9), bf16, 128, 128),
        ((9, 0), fp32, 128, 128),
    ]:
        assert lists.too_large(*fits) is None
    assert lists.too_large((10, 0), fp32, 128, 128) is None
    for capability in ((12, 0), (12, 1), (13, 0)):  # 99 KiB, or unknown
        assert lists.too_large(capability, fp32, 128, 16) == lists.too_large((8, 9), fp32, 128, 16).replace(
            "sm_89", f"sm_{capability[0]}{capability[1]}"
        )
