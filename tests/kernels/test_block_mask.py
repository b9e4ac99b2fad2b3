import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex

from efftrain_ds.kernels.attention import patterns
from efftrain_ds.kernels.attention.mask import BlockMask
from efftrain_ds.kernels.attention.reference import attention_reference

from .common import DEVICE, needs_gpu

LISTS = ("row_cnt", "row_idx", "col_cnt", "col_idx", "row_bits")


def some(heads, n, m, seed=0, share=0.5):
    keep = torch.rand(heads, n, m, generator=torch.Generator().manual_seed(seed)) < share
    return keep.to(DEVICE)


def assert_lists(mask):
    """The lists against the definition, entry by entry on the host."""
    keep = mask.keep.tolist()
    kept = []
    for h, rows in enumerate(keep):
        columns = [list(c) for c in zip(*rows, strict=True)]
        for lines, count, index in ((rows, mask.row_cnt, mask.row_idx), (columns, mask.col_cnt, mask.col_idx)):
            for i, line in enumerate(lines):
                inside = [j for j, k in enumerate(line) if k]
                assert count[h, i] == len(inside)
                assert index[h, i].tolist() == inside + [j for j, k in enumerate(line) if not k]
        for i, line in enumerate(rows):
            bits = sum(1 << j for j, k in enumerate(line) if k) if len(line) <= 64 else 0
            assert mask.row_bits[h, i].item() % (1 << 64) == bits
        kept.append(sum(map(sum, rows)))
    assert mask.density == sum(kept) / mask.keep.numel()
    assert mask.row_bits.dtype == torch.int64
    assert {getattr(mask, name).dtype for name in LISTS if name != "row_bits"} == {torch.int32}


@pytest.mark.parametrize(
    ("shape", "lengths", "block"),
    [
        ((3, 4, 4), (197, 197), 64),
        ((1, 3, 5), (33, 65), 16),
        ((2, 1, 64), (5, 1024), 16),
        ((1, 2, 65), (17, 1025), 16),
        ((2, 1, 1), (1, 1), 128),
    ],
)
def test_lists_follow_updates_in_place(shape, lengths, block):
    mask = BlockMask(some(*shape), *lengths, block)
    assert_lists(mask)
    places = {name: getattr(mask, name).data_ptr() for name in ("keep", *LISTS)}
    for keep in (some(*shape, seed=1, share=0.2), some(*shape, share=0.0), some(*shape, share=1.1)):
        assert mask.update_(keep) is mask
        assert torch.equal(mask.keep, keep)
        assert_lists(mask)
    assert places == {name: getattr(mask, name).data_ptr() for name in places}


def test_the_mask_owns_its_state():
    keep = some(2, 2, 2)
    mask = BlockMask(keep, 32, 32, 16)
    before = mask.keep.clone()
    keep.logical_not_()
    assert torch.equal(mask.keep, before)
    twin = copy.deepcopy(mask)
    twin.update_(~before)
    assert torch.equal(mask.keep, before)
    assert_lists(twin)


def test_head_types_and_density():
    keep = torch.ones(4, 2, 3, dtype=torch.bool, device=DEVICE)
    keep[1] = False
    keep[2, 0, 1] = False
    mask = BlockMask(keep, 20, 40, 16)
    assert mask.head_types == ("dense", "pruned", "sparse", "dense")
    assert mask.density == (6 + 0 + 5 + 6) / 24
    full = BlockMask.full(1, 20, 40, 16, DEVICE)
    assert full.head_types == ("dense",)
    assert full.density == 1.0


def test_dense_form():
    mask = BlockMask(some(3, 3, 4, seed=4), 37, 50, 16)
    dense = mask.to_dense()
    assert dense.shape == (3, 37, 50)
    for h, i, j in [(0, 0, 0), (1, 15, 16), (2, 16, 15), (0, 36, 49), (1, 31, 48), (2, 32, 47)]:
        assert dense[h, i, j] == mask.keep[h, i // 16, j // 16]
    blockwise = dense[:, ::16, ::16]
    assert torch.equal(blockwise, mask.keep)


def test_state_is_keep_alone_and_loading_rebuilds():
    source = nn.ModuleDict({"attn": BlockMask(some(2, 4, 4, seed=2), 197, 197)})
    assert set(source.state_dict()) == {"attn.keep"}
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = nn.ModuleDict({"attn": BlockMask(some(2, 4, 4, seed=3), 197, 197)})
    assert target["attn"].density != source["attn"].density
    place = target["attn"].row_idx.data_ptr()
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(target["attn"].keep, source["attn"].keep)
    assert_lists(target["attn"])
    assert target["attn"].row_idx.data_ptr() == place
    with torch.device("meta"):
        empty = nn.ModuleDict({"attn": BlockMask(torch.ones(2, 4, 4, dtype=torch.bool), 197, 197)})
    empty.load_state_dict(source.state_dict(), assign=True)
    assert_lists(empty["attn"])
    half = source.to(torch.bfloat16)["attn"]
    assert half.keep.dtype == torch.bool
    assert_lists(half)


def test_density_follows_changes_of_the_buffers():
    # what a rebuild of an engine and a loaded checkpoint do: buffers are copied one by one, without the class's code
    mask = BlockMask.full(1, 32, 32, 16, DEVICE)
    assert mask.density == 1.0
    twin, other = copy.deepcopy(mask), BlockMask(torch.eye(2, device=DEVICE)[None].bool(), 32, 32, 16)
    for name, buffer in twin.named_buffers():
        buffer.copy_(getattr(other, name))
    assert twin.density == 0.5
    assert twin.head_types == ("sparse",)
    assert_lists(twin)


def test_state_of_another_shape_is_one_error():
    target = nn.ModuleDict({"attn": BlockMask(some(2, 4, 4), 197, 197)})
    before = target["attn"].keep.clone()
    for wrong, found in (
        (some(2, 5, 5), r"\(2, 5, 5\), allowed is \(2, 4, 4\): 197 queries and 197 keys in blocks of 64"),
        (some(3, 4, 4), r"\(3, 4, 4\), allowed is \(2, 4, 4\)"),
        (torch.ones(2, 4, 4), "keep is a bool tensor, found torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=f"attn.keep: block mask.*{found}") as error:
            target.load_state_dict({"attn.keep": wrong})
        assert str(error.value).count("attn.keep") == 1
        assert torch.equal(target["attn"].keep, before)
        assert_lists(target["attn"])
    with pytest.raises(RuntimeError, match="Missing key.*attn.keep"):
        target.load_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(1, 4, 4), 197, 197), "keep is a bool tensor, found torch.float32"),
        (([[True]], 16, 16), "keep is a bool tensor, found list"),
        ((some(1, 4, 4), 197, 197, 48), "block is 16, 32, 64 or 128 tokens, found 48"),
        ((some(1, 4, 4), 197, 257), r"\(1, 4, 4\), allowed is \(heads, 4, 5\): 197 queries and 257 keys"),
        ((some(4, 4, 1)[..., 0], 197, 197), r"keep has shape \(4, 4\), allowed is \(heads, 4, 4\)"),
        ((some(0, 4, 4), 197, 197), r"\(0, 4, 4\), allowed is \(heads, 4, 4\)"),
        ((some(1, 4, 4), 0, 197), "q_len is an integer >= 1, found 0"),
        ((some(1, 4, 4), 197, 197.0), "kv_len is an integer >= 1, found 197.0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockMask(*arguments)


def test_update_and_input_errors():
    mask = BlockMask(some(2, 4, 4), 197, 197)
    for wrong, message in (
        (some(1, 4, 4), r"\(1, 4, 4\), allowed is \(2, 4, 4\)"),
        (some(2, 4, 5), r"\(2, 4, 5\), allowed is \(2, 4, 4\)"),
        (some(2, 4, 4).int(), "found torch.int32"),
        (some(2, 4, 4).to("meta"), f"keep is on meta, the mask on {mask.keep.device}"),
    ):
        with pytest.raises(ValueError, match=message):
            mask.update_(wrong)
    mask.check(2, 197, 197, mask.keep.device)
    BlockMask(some(1, 4, 4), 197, 197).check(6, 197, 197, mask.keep.device)
    with pytest.raises(ValueError, match="made for 2 heads, the input has 6"):
        mask.check(6, 197, 197, mask.keep.device)
    with pytest.raises(ValueError, match="197 queries and 197 keys, the input has 197 and 196"):
        mask.check(2, 197, 196, mask.keep.device)
    with pytest.raises(ValueError, match="the input on meta"):
        mask.check(2, 197, 197, torch.device("meta"))


def test_update_under_fake_tensors():
    with FakeTensorMode():
        mask = BlockMask(torch.ones(2, 4, 3, dtype=torch.bool), 60, 40, 16)
        mask.update_(torch.zeros(2, 4, 3, dtype=torch.bool))
        assert mask.row_idx.shape == (2, 4, 3)
        assert mask.col_idx.shape == (2, 3, 4)
        assert mask.to_dense().shape == (2, 60, 40)


def test_update_and_lists_in_compiled_code():
    # Both an update inside of compiled code and updates around it: new values, never a new compilation.
    mask = BlockMask(some(2, 3, 3), 40, 40, 16)
    place = mask.row_idx.data_ptr()

    def read(x):
        inside = torch.arange(3, device=x.device) < mask.row_cnt[..., None]
        return (x * (mask.row_idx * inside).sum() + mask.col_cnt.sum() + mask.row_bits.sum()).sum()

    def change_and_read(x, keep):
        mask.update_(keep)
        return read(x)

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
        both = torch.compile(change_and_read, fullgraph=True, backend="aot_eager")
        x, seen = torch.ones(4, device=DEVICE), set()
        for seed in range(5):
            mask.update_(some(2, 3, 3, seed=seed))
            assert mask.density > 0
            out = compiled(x)
            assert out == read(x)
            seen.add(out.item())
        for seed in range(3, 6):
            keep = some(2, 3, 3, seed=seed)
            out = both(x, keep)
            assert torch.equal(mask.keep, keep)
            assert_lists(mask)
            assert out == read(x)
    assert len(seen) > 2
    assert mask.row_idx.data_ptr() == place


@needs_gpu
def test_update_does_not_sync():
    mask, keep = BlockMask(some(6, 17, 17), 1025, 1025), some(6, 17, 17, seed=1)
    mask.update_(keep)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask.update_(~keep)
        graph = torch.cuda.CUDAGraph()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        mask.update_(keep)
    keep.copy_(some(6, 17, 17, seed=2))
    graph.replay()
    torch.cuda.synchronize()
    assert_lists(mask)


@pytest.mark.parametrize(
    ("shape", "lengths", "block"), [((3, 4, 4), (197, 197), 64), ((1, 2, 3), (32, 37), 16), ((2, 2, 2), (64, 64), 32)]
)
def test_flex_round_trip(shape, lengths, block):
    keep = some(*shape, seed=5)
    keep[0, 1] = False
    mask = BlockMask(keep, *lengths, block)
    there = mask.to_flex()
    assert there.shape == (1, shape[0], *lengths)
    assert there.BLOCK_SIZE == (block, block)
    assert torch.equal(there.to_dense()[0].bool(), keep)
    whole = torch.tensor(
        [[(i + 1) * block <= n for i in range(m)] for n, m in ((lengths[0], shape[1]),)], device=DEVICE
    )
    whole = whole[0][:, None] & torch.tensor([(j + 1) * block <= lengths[1] for j in range(shape[2])], device=DEVICE)
    assert torch.equal(there.full_kv_num_blocks[0], (keep & whole).sum(-1, dtype=torch.int32))
    assert torch.equal(there.kv_num_blocks[0], (keep & ~whole).sum(-1, dtype=torch.int32))
    tokens = flex.create_mask(there.mask_mod, 1, shape[0], *lengths, device=DEVICE)[0]
    assert torch.equal(tokens, mask.to_dense())
    for partial in ("exact", "keep"):
        back = BlockMask.from_flex(there, partial=partial)
        assert torch.equal(back.keep, keep)
        assert (back.q_len, back.kv_len, back.block) == (*lengths, block)
    mask.update_(~keep)
    assert torch.equal(there.to_dense()[0].bool(), keep)  # a copy


def test_masks_of_flex_are_taken_over():
    def from_flex(function, heads=2, **options):
        made = flex.create_block_mask(function, options.pop("batch", 1), heads, 50, 40, device=DEVICE, BLOCK_SIZE=16)
        return BlockMask.from_flex(made, **options)

    blocks = from_flex(lambda b, h, q, k: (q // 16 + h) % 2 == (k // 16) % 2)
    expected = torch.tensor([[[(i + h) % 2 == j % 2 for j in range(3)] for i in range(4)] for h in range(2)])
    assert torch.equal(blocks.keep.cpu(), expected)
    assert_lists(blocks)
    with pytest.raises(ValueError, match=r"\(0, 0, 0\) and 5 more are cut by the mask function"):
        from_flex(lambda b, h, q, k: q >= k)
    rounded = from_flex(lambda b, h, q, k: q >= k, partial="keep")
    assert torch.equal(rounded.keep.cpu(), torch.ones(2, 4, 3, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"one for all images.*found \(3, 2\)"):
        from_flex(lambda b, h, q, k: q // 16 >= b, batch=3)
    made = flex.create_block_mask(lambda b, h, q, k: q >= 0, 1, 1, 50, 40, device=DEVICE, BLOCK_SIZE=(16, 32))
    with pytest.raises(ValueError, match="16 queries x 32 keys, allowed are squares of 16, 32, 64 or 128"):
        BlockMask.from_flex(made)
    # lists alone, without a function: entries past the count mean nothing
    count = torch.tensor([[[1, 2]]], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([[[[1, 1], [0, 1]]]], dtype=torch.int32, device=DEVICE)
    bare = BlockMask.from_flex(flex.BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=16))
    assert bare.keep.tolist() == [[[False, True], [True, True]]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [1, 2])
def test_flex_attention_agrees(heads):
    keep = some(heads, 3, 3, seed=7)
    keep[:, 0, 0] = keep[:, 1, 2] = keep[:, 2, 1] = True  # its eager form defines empty rows by itself
    mask = BlockMask(keep, 40, 37, 16)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=g, dtype=torch.float64).to(DEVICE) for n in (40, 37, 37))
    theirs = flex.flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask.to_flex(), scale=0.3)
    ours, _ = attention_reference(q, k, v, mask.to_dense(), 0.3)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=0, atol=1e-12)


def test_reference_and_its_empty_rows():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    keep = torch.rand(3, 5, 7, generator=g) < 0.5
    keep[0, 2] = keep[1, :, 3] = keep[2] = False  # an empty row, an empty column, an empty head
    out, lse = attention_reference(q, k, v, keep, 0.4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.4
    weights = scores.exp() * keep
    total = weights.sum(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights / total.clamp(min=1e-300)[..., None], v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    empty = ~keep.any(-1)
    assert (out.transpose(1, 2)[:, empty] == 0).all()
    assert (lse[:, empty] == torch.inf).all()
    torch.testing.assert_close(lse[:, ~empty], total.log2()[:, ~empty].detach(), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, keep, 0.4)[0], (q, k, v))
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq.transpose(1, 2)[:, empty] == 0).all()
    for gradient in (dk, dv):
        assert (gradient[:, 3, 1] == 0).all()
        assert (gradient[:, :, 2] == 0).all()
        assert (gradient[:, :3, 0] != 0).any()
    free, _ = attention_reference(q, k, v, None, 0.4)
    sdpa = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.4)
    torch.testing.assert_close(free, sdpa.transpose(1, 2), rtol=0, atol=1e-12)
    low, low_lse = attention_reference(*(t.detach().bfloat16() for t in (q, k, v)), keep, 0.4)
    assert (low.dtype, low_lse.dtype) == (torch.bfloat16, torch.float32)


def test_tile_order_by_coordinates():
    rows, columns, tile, extra = 8, 12, 4, 2
    order = patterns.tile_order((rows, columns), tile, extra)
    place = 0
    for tile_row in range(rows // tile):
        for tile_column in range(columns // tile):
            for r in range(tile):
                for c in range(tile):
                    patch = (tile_row * tile + r) * columns + tile_column * tile + c
                    assert order[place] == extra + patch
                    place += 1
    assert order[place:].tolist() == [0, 1]  # the class token is last
    inverse = patterns.inverse_order(order)
    x = torch.randn(2, rows * columns + extra, 3)
    assert torch.equal(x.index_select(1, order).index_select(1, inverse), x)
    assert not torch.equal(order, inverse)  # else the test above could not tell them apart
    with pytest.raises(ValueError, match="14 x 14 patches has no whole tiles of 8 x 8"):
        patterns.tile_order((14, 14))


@pytest.mark.parametrize(
    ("grid", "window", "block", "tile", "extra"),
    [
        ((16, 16), 7, 64, 8, 1),
        ((16, 24), 17, 64, 8, 0),
        ((8, 16), 5, 16, 8, 1),
        ((6, 10), 3, 16, None, 2),
        ((8, 8), 1, 16, 4, 0),
    ],
)
def test_windows_by_coordinates(grid, window, block, tile, extra):
    keep = patterns.windows(grid, window, block, tile=tile, extra=extra)
    length = grid[0] * grid[1] + extra
    n = -(-length // block)
    assert keep.shape == (1, n, n)
    order = (torch.arange(grid[0] * grid[1]) if tile is None else patterns.tile_order(grid, tile)).tolist()
    blocks = [[divmod(p, grid[1]) for p in order[i * block : (i + 1) * block]] for i in range(n)]
    special = {t // block for t in range(length - extra, length)}
    for i in range(n):
        for j in range(n):
            near = any(max(abs(r - s), abs(c - d)) <= window // 2 for r, c in blocks[i] for s, d in blocks[j])
            assert keep[0, i, j] == (near or i in special or j in special), (i, j)


def test_windows_of_tiles():
    alone = patterns.tile_windows((16, 24), 0, extra=1)
    assert alone.shape == (1, 7, 7)
    assert torch.equal(alone, patterns.union(patterns.diagonal((7, 7)), patterns.global_tokens(385, 385, [-1])))
    near = patterns.tile_windows((16, 24), 1)[0]
    for i in range(6):
        for j in range(6):
            assert near[i, j] == (abs(i // 3 - j // 3) <= 1 and abs(i % 3 - j % 3) <= 1)
    # smaller blocks follow their tile, larger ones take the union of theirs
    fine = patterns.tile_windows((16, 24), 1, 16)[0]
    assert torch.equal(fine, near.repeat_interleave(4, 0).repeat_interleave(4, 1))
    coarse = patterns.tile_windows((16, 24), 1, 128)[0]
    assert torch.equal(coarse, near.view(3, 2, 3, 2).any(3).any(1))
    with pytest.raises(ValueError, match="radius is >= 0, found -1"):
        patterns.tile_windows((16, 24), -1)


def test_which_order_makes_windows_sparse():
    # what the module says: tiles pay from windows of about two tiles on, and for windows made of tiles
    def kept(window, tile):
        return patterns.windows((32, 32), window, tile=tile).float().mean().item()

    assert kept(7, None) < kept(7, 8) == kept(15, 8) == (4 + 6) ** 2 / 256 < kept(15, None)


def test_strided_and_diagonal():
    keep = patterns.strided((7, 9), 4, local=2, heads=3)
    for h in range(3):
        for i in range(7):
            for j in range(9):
                assert keep[h, i, j] == (abs(i - j) < 2 or (i - j + h) % 4 == 0)
    assert patterns.strided((4, 4), 1).all()
    assert patterns.diagonal((3, 3))[0].tolist() == torch.eye(3).bool().tolist()
    assert patterns.diagonal((2, 4))[0].nonzero().tolist() == [[0, 0], [1, 2]]
    assert patterns.diagonal((4, 2))[0].nonzero().tolist() == [[0, 0], [1, 0], [2, 1], [3, 1]]


def test_global_tokens():
    keep = patterns.global_tokens(197, 197, [-1, 70])
    assert keep.shape == (1, 4, 4)
    for i in range(4):
        for j in range(4):
            assert keep[0, i, j] == (i in (1, 3) or j in (1, 3))
    uneven = patterns.global_tokens(33, 65, [-1], 16)  # last query in block 2, last key in block 4
    assert uneven[0].nonzero().tolist() == [[0, 4], [1, 4], *([2, j] for j in range(5))]
    with pytest.raises(ValueError, match="token 50 is outside of 65 queries or 50 keys"):
        patterns.global_tokens(65, 50, [50])


@pytest.mark.parametrize("per", ["head", "row"])
def test_random_blocks(per):
    def draw(seed, **options):
        return patterns.random_blocks((9, 10), 0.4, 3, torch.Generator().manual_seed(seed), per=per, **options)

    keep = draw(1)
    assert torch.equal(keep, draw(1))
    assert not torch.equal(keep, draw(2))
    assert not torch.equal(keep[0], keep[1])
    assert (keep.sum((1, 2)) == 36).all()
    if per == "row":
        assert (keep.sum(2) == 4).all()
    else:
        assert len(set(keep.sum(2).flatten().tolist())) > 1
    assert (keep | ~patterns.diagonal((9, 10))).all()
    certain = patterns.global_tokens(9 * 16, 10 * 16, [-1], 16)
    kept = draw(1, always=certain)
    assert (kept | ~certain).all()
    assert (kept | ~patterns.diagonal((9, 10))).all()
    if per == "head":
        assert (kept.sum((1, 2)) == 36).all()


def test_from_scores():
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.8, 0.2, 0.5]], [[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]])
    by_head = patterns.from_scores(scores, 0.5)
    assert by_head.int().tolist() == [[[0, 1, 1], [1, 0, 0]], [[0, 0, 0], [1, 1, 1]]]  # the tie at .5: lower index
    by_row = patterns.from_scores(scores, 1 / 3, per="row")
    assert by_row.int().tolist() == [[[0, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]]]
    always = torch.zeros(1, 2, 3, dtype=torch.bool)
    always[0, 0, 2] = True
    inf = scores.clone()
    inf[0, 1] = torch.inf
    assert patterns.from_scores(inf, 1 / 3, always=always).int()[0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert patterns.from_scores(scores, 1 / 6, always=~always)[0].sum() == 5  # more certain blocks than the density
    assert not patterns.from_scores(scores, 0.0).any()
    assert patterns.from_scores(scores, 0.01).sum((1, 2)).tolist() == [1, 1]
    assert patterns.from_scores(scores, 1.0).all()
    learned = scores.clone().requires_grad_()
    assert not patterns.from_scores(learned, 0.5).requires_grad
    with pytest.raises(ValueError, match="density is 0 to 1, found 1.5"):
        patterns.from_scores(scores, 1.5)
    with pytest.raises(ValueError, match='per is "head" or "row", found \'layer\''):
        patterns.from_scores(scores, 0.5, per="layer")
    with pytest.raises(ValueError, match=r"always has shape \(3, 2, 3\), allowed is \(1 or 2, 2, 3\)"):
        patterns.from_scores(scores, 0.5, always=always.expand(3, 2, 3))


def test_union_and_pruned_heads():
    one, many = patterns.diagonal((3, 3)), some(4, 3, 3).cpu()
    both = patterns.union(one, many, one)
    assert both.shape == (4, 3, 3)
    assert torch.equal(both, one | many)
    with pytest.raises(ValueError, match=r"one nQ x nK and 1 or H heads, found \[\(1, 3, 3\), \(1, 3, 4\)\]"):
        patterns.union(one, patterns.diagonal((3, 4)))
    with pytest.raises(ValueError, match=r"\(4, 3, 3\), \(2, 3, 3\)"):
        patterns.union(many, many[:2])
    pruned = patterns.prune_heads(one, torch.tensor([True, False]))
    assert BlockMask(pruned, 48, 48, 16).head_types == ("sparse", "pruned")
