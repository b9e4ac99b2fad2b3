import pytest
import torch
from torch.nn.functional import linear

from efftrain_ds.kernels.attention.compaction import HeadWeights, compact_heads, live_heads, mask_heads
from efftrain_ds.kernels.attention.reference import attention_reference

B, N, C, H, D = 2, 6, 10, 4, 3
NAMES = ("x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
LIVE = {
    "two of four": [False, True, False, True],
    "one": [False, False, True, False],
    "all": [True] * 4,
    "none": [False] * 4,
}


def layer(seed=0, dtype=torch.float64, width_out=7):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, N, C), (3 * H * D, C), (3 * H * D,), (width_out, H * D), (width_out,))
    return [torch.randn(*s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def forward(x, weights, heads, keep=None):
    qkv = linear(x, weights.qkv_weight, weights.qkv_bias).view(*x.shape[:2], 3, heads, D)
    out, _ = attention_reference(*qkv.unbind(2), keep, D**-0.5)
    return linear(out.flatten(2), weights.proj_weight, weights.proj_bias)


def outputs_and_gradients(out, tensors):
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    grads = torch.autograd.grad(out, tensors, g, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))]


@pytest.mark.parametrize("form", ["index", "bool"])
@pytest.mark.parametrize("dead_bias", ["mask", "fold"])
@pytest.mark.parametrize("which", LIVE)
def test_compact_equals_masked_dense(which, dead_bias, form):
    live, tensors = torch.tensor(LIVE[which]), layer()
    count = int(live.sum())
    given = live if form == "bool" else live_heads(live, count)
    small = compact_heads(*tensors[1:], given, H, dead_bias)
    assert small.qkv_weight.shape == (3 * count * D, C)
    assert small.qkv_bias.shape == (3 * count * D,)
    assert small.proj_weight.shape == (7, count * D)
    ours = outputs_and_gradients(forward(tensors[0], small, count), tensors)
    dense = outputs_and_gradients(forward(tensors[0], mask_heads(*tensors[1:], live, H, dead_bias), H), tensors)
    for name, a, b in zip(("out", *NAMES), ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    # dead rows: exactly nothing, in every tensor that the reading masks
    dead = (~live)[:, None].expand(H, D).reshape(-1)
    assert (ours[2].view(3, H * D, C)[:, dead] == 0).all()
    bias = ours[3].view(3, H * D)[:, dead]
    assert (bias[:2] == 0).all()
    if dead_bias == "mask":
        assert (bias == 0).all()
        assert (ours[4][:, dead] == 0).all()
    elif dead.any():
        assert (bias[2] != 0).all()  # b_v of dead heads still trains
        assert (ours[4][:, dead] != 0).any()
    alive = ~dead
    if alive.any():
        assert (ours[2].view(3, H * D, C)[:, alive] != 0).any()


def test_readings_differ_by_the_constant_of_dead_heads():
    live, tensors = torch.tensor(LIVE["two of four"]), layer()
    masked, folded = (compact_heads(*tensors[1:], live, H, r) for r in ("mask", "fold"))
    dead = (~live)[:, None].expand(H, D).reshape(-1)
    constant = tensors[3][:, dead] @ tensors[2].view(3, -1)[2, dead]
    torch.testing.assert_close(folded.proj_bias - masked.proj_bias, constant, rtol=0, atol=1e-12)
    assert constant.abs().max() > 0.1
    # the trap: weights masked, biases left alone, compacted by the other reading
    dense = forward(tensors[0], mask_heads(*tensors[1:], live, H, "fold"), H)
    assert (forward(tensors[0], masked, 2) - dense).abs().max() > 0.1


def test_block_masks_of_heads_are_gathered_alike():
    live, tensors = torch.tensor(LIVE["two of four"]), layer()
    keep = torch.rand(H, N, N, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[1, 2] = False  # an empty row of a live head
    index = live_heads(live, 2)
    small = forward(tensors[0], compact_heads(*tensors[1:], index, H), 2, keep[index])
    dense = forward(tensors[0], mask_heads(*tensors[1:], live, H), H, keep)
    torch.testing.assert_close(small, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dead_bias", ["mask", "fold"])
def test_without_biases(dead_bias):
    live, (x, qkv_weight, qkv_bias, proj_weight, _) = torch.tensor(LIVE["one"]), layer()
    bare = compact_heads(qkv_weight, None, proj_weight, None, live, H, dead_bias)
    assert bare.qkv_bias is None
    assert bare.proj_bias is None
    dense = mask_heads(qkv_weight, None, proj_weight, None, live, H, dead_bias)
    torch.testing.assert_close(forward(x, bare, 1), forward(x, dense, H), rtol=0, atol=1e-12)
    half = compact_heads(qkv_weight, qkv_bias, proj_weight, None, live, H, dead_bias)
    dense = mask_heads(qkv_weight, qkv_bias, proj_weight, None, live, H, dead_bias)
    torch.testing.assert_close(forward(x, half, 1), forward(x, dense, H), rtol=0, atol=1e-12)


def test_step_before_a_regrowth_sees_dense_gradients():
    live, tensors = torch.tensor(LIVE["two of four"]), layer()
    masked = outputs_and_gradients(forward(tensors[0], mask_heads(*tensors[1:], live, H), H), tensors)
    grown = outputs_and_gradients(forward(tensors[0], mask_heads(*tensors[1:], live, H, dense_grad=True), H), tensors)
    assert torch.equal(masked[0], grown[0])
    alive = live[:, None].expand(H, D).reshape(-1)
    rows, rows_masked = (g[2].view(3, H * D, C) for g in (grown, masked))
    torch.testing.assert_close(rows[:, alive], rows_masked[:, alive], rtol=0, atol=1e-12)
    assert (rows[2, ~alive].abs().sum(1) > 0).all()  # the values' rows; q and k of a zero head sit on a saddle
    assert (grown[3].view(3, -1)[2, ~alive] != 0).all()


def test_swapped_heads_compile_once():
    tensors = layer()

    def compact(w, b, p, pb, live):
        return tuple(compact_heads(w, b, p, pb, live_heads(live, 2), H, "fold"))

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
        for i in range(5):
            live = torch.zeros(H, dtype=torch.bool)
            live[[i % H, (i + 1) % H]] = True
            small = HeadWeights(*compiled(*tensors[1:], live))
            ours = outputs_and_gradients(forward(tensors[0], small, 2), tensors)
            dense = outputs_and_gradients(forward(tensors[0], mask_heads(*tensors[1:], live, H, "fold"), H), tensors)
            for a, b in zip(ours, dense, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_fold_keeps_its_precision_under_autocast():
    tensors = layer(dtype=torch.float32)
    live = torch.tensor(LIVE["one"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compact_heads(*tensors[1:], live, H, "fold").proj_bias
    assert torch.equal(inside, compact_heads(*tensors[1:], live, H, "fold").proj_bias)


def test_bad_input_is_named():
    _, *tensors = layer()
    live = torch.tensor(LIVE["two of four"])
    with pytest.raises(ValueError, match=r'"mask" or "fold", found \'drop\''):
        compact_heads(*tensors, live, H, "drop")
    with pytest.raises(ValueError, match=r"live is bool \(4,\), found torch.bool \(3,\)"):
        compact_heads(*tensors, live[:3], H)
    with pytest.raises(ValueError, match=r"int64 \(L,\) with L <= 4, found torch.float32 \(4,\)"):
        compact_heads(*tensors, live.float(), H)
    with pytest.raises(ValueError, match=r"3 \* 5 heads \* head dim, width\), found \(36, 10\)"):
        compact_heads(*tensors, live, 5)
    with pytest.raises(ValueError, match=r"projection takes 12 channels.*found \(7, 11\)"):
        compact_heads(tensors[0], tensors[1], tensors[2][:, 1:], tensors[3], live, H)
    with pytest.raises(ValueError, match=r"the qkv bias is \(36,\), found \(35,\)"):
        compact_heads(tensors[0], tensors[1][1:], *tensors[2:], live, H)
    with pytest.raises(ValueError, match="count is 0 to 4, found 5"):
        live_heads(live, 5)
