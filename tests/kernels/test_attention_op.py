"""The attention operation: implementations agree, torch integration, checks before any launch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from efftrain_ds.kernels import runtime
from efftrain_ds.kernels.attention import (
    BlockMask,
    attention,
    attention_qkv,
    attention_reference,
    lists,
    op,
    operators,
    route_for,
)
from efftrain_ds.kernels.attention import self_test as attention_self_test
from efftrain_ds.kernels.attention.operators import SAVED
from tests.kernels.common import DEVICE, GPU, INTERPRETED, needs_gpu, needs_kernels, relative_error

BACKEND = "inductor" if GPU else "aot_eager"  # inductor needs a compiler on a CPU

if INTERPRETED or GPU:  # imports Triton
    from efftrain_ds.kernels.attention import resident

KERNEL_ROUTES = [pytest.param("list", marks=needs_kernels), pytest.param("resident", marks=needs_kernels)]
ROUTES = ["reference", "sdpa", *KERNEL_ROUTES]
# float64 runs the kernels' own source with float64 accumulators, in the interpreter only
EXACT, TOLERANCE = (torch.float64, 1e-12) if INTERPRETED else (torch.float32, 2e-6)
DIM = 64 if GPU else 16  # the resident kernels on a GPU have no 16
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}  # of compiled code against eager code


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv(runtime.VARIABLE, raising=False)
    # fresh memory is full of NaN: an element that is not written shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def block_mask(heads: int = 2, n: int = 20, block: int = 16, seed: int = 0, n_k: int | None = None) -> BlockMask:
    rows, columns = -(-n // block), -(-(n_k or n) // block)
    keep = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    return BlockMask(keep.to(DEVICE), n, n_k or n, block)


def packed(batch: int = 1, n: int = 20, heads: int = 2, dim: int = DIM, dtype: torch.dtype = EXACT, seed: int = 0):
    qkv = torch.randn(batch, n, 3, heads, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return qkv.to(DEVICE, dtype).requires_grad_()


def accuracy(route: str) -> float:
    return 5e-6 if GPU and route == "sdpa" else TOLERANCE  # torch's kernels are not ours to judge


def weights(out: torch.Tensor) -> torch.Tensor:
    return torch.arange(out.numel(), device=out.device).view(out.shape).cos().to(out.dtype)


def run(qkv: torch.Tensor, mask: BlockMask | None, route: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    out = attention(qkv, mask, route=route)
    return out.detach(), torch.autograd.grad((out * weights(out)).sum(), qkv)[0]


def exact(qkv: torch.Tensor, mask: BlockMask | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Through torch's own gradient of the definition, in float64."""
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.unbind(2)
    out = attention_reference(q, k, v, None if mask is None else mask.to_dense(), qkv.shape[-1] ** -0.5)[0]
    return out.detach(), torch.autograd.grad((out * weights(out)).sum(), wide)[0]


# ---- implementations agree


@pytest.mark.parametrize("route", ROUTES)
def test_output_and_gradients_with_empty_rows_and_columns(route):
    if route == "resident" and not INTERPRETED:
        pytest.skip("the resident kernels take 16-bit types on a GPU")
    mask = block_mask(n=36)
    mask.update_(torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 0, 0]], [[0, 0, 0]] * 3], device=DEVICE).bool())
    qkv = packed(n=36)
    out, grad = run(qkv, mask, route)
    for found, wanted in zip((out, grad), exact(qkv, mask), strict=True):
        assert relative_error(found, wanted) < accuracy(route)
    assert (out[:, 16:32, 0] == 0).all(), "a query without keys gives 0"
    assert (out[:, :, 1] == 0).all(), "a pruned head gives 0"
    assert (grad[:, 16:32, 0, 0] == 0).all(), "and its query gets no gradient"
    assert (grad[:, :, :, 1] == 0).all()
    assert (grad[:, 16:32, 1:, 0] == 0).all(), "nor do keys that no query sees"
    assert out.is_contiguous()
    assert grad.is_contiguous()


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_mask(route):
    if route == "resident" and not INTERPRETED:
        pytest.skip("the resident kernels take 16-bit types on a GPU")
    qkv = packed(n=17)
    for found, wanted in zip(run(qkv, None, route), exact(qkv, None), strict=True):
        assert relative_error(found, wanted) < accuracy(route)


@pytest.mark.parametrize("route", ["reference", "sdpa", KERNEL_ROUTES[0]])
def test_separate_tensors_of_two_lengths_and_any_strides(route):
    mask = block_mask(n=20, n_k=9)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, 2, n, 16, generator=draw, dtype=torch.float64).to(DEVICE, EXACT).transpose(1, 2).requires_grad_()
        for n in (20, 9, 9)
    )
    out = attention_qkv(q, k, v, mask, 0.3, route=route)
    grads = torch.autograd.grad((out * weights(out)).sum(), (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = attention_reference(*wide, mask.to_dense(), 0.3)[0]
    assert relative_error(out, wanted) < accuracy(route)
    for found, true in zip(grads, torch.autograd.grad((wanted * weights(wanted)).sum(), wide), strict=True):
        assert relative_error(found, true) < accuracy(route)


@pytest.mark.parametrize("route", ROUTES)
def test_expanded_gradient_and_fp16(route):
    qkv = packed(n=17, dtype=torch.float16)
    out = attention(qkv, block_mask(n=17), route=route)
    out.sum().backward()  # the gradient of a sum has strides 0
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.unbind(2)
    attention_reference(q, k, v, block_mask(n=17).to_dense(), DIM**-0.5)[0].sum().backward()
    assert out.dtype == torch.float16
    assert relative_error(qkv.grad, wide.grad) < 6e-4
    assert qkv.grad.stride() == qkv.stride(), "dqkv has the layout of qkv"


@needs_kernels
def test_gradient_whose_tokens_are_too_far_apart_is_copied(monkeypatch):
    """One block of tokens over 2^31 elements: pretended, the memory would be 4 GiB."""
    seen, backward = [], lists.backward
    monkeypatch.setattr(lists, "too_far", lambda x, block: x.stride(1) == 1000)
    monkeypatch.setattr(lists, "backward", lambda *a: (seen.append(a[5].stride()), backward(*a)) and None)
    qkv = packed(n=16, heads=1, dtype=torch.float32)
    out = attention(qkv, route="list")
    wide = torch.zeros(1, 16, 1000, device=DEVICE)[..., :DIM].unflatten(-1, (1, DIM))
    wide.copy_(weights(out))
    (found,) = torch.autograd.grad(out, qkv, wide, retain_graph=True)
    (wanted,) = torch.autograd.grad(out, qkv, weights(out))
    assert [strides[1] for strides in seen] == [DIM, DIM]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("route", ["sdpa", *KERNEL_ROUTES])
def test_two_lengths_and_two_masks_in_one_process(route):
    dtype, limit = (torch.float16, 6e-4) if GPU and route == "resident" else (torch.float32, 5e-6 if GPU else 2e-6)
    for n in (20, 36, 20):
        for seed in (1, 2):
            qkv, mask = packed(n=n, heads=1, dtype=dtype), block_mask(heads=1, n=n, seed=seed)
            for found, wanted in zip(run(qkv, mask, route), exact(qkv, mask), strict=True):
                assert relative_error(found, wanted) < limit


def test_empty_batch():
    for route in ("reference", "sdpa"):
        qkv = packed(batch=0)
        out, grad = run(qkv, block_mask(), route)
        assert out.shape == (0, 20, 2, 16)
        assert grad.shape == qkv.shape


# ---- torch


def samples(kernel: str, masked: bool):
    mask = block_mask() if masked else None
    options = (*op._lists(mask), op._block(mask), 0.3, kernel, False)
    qkv = packed(dtype=torch.float32)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in qkv.unbind(2))
    out, lse = (x.detach() for x in torch.ops.efftrain_ds.attention_packed(qkv, *options))
    dout = weights(out)
    yield torch.ops.efftrain_ds.attention_packed, (qkv, *options)
    yield torch.ops.efftrain_ds.attention_unpacked, (q, k, v, *options)
    yield torch.ops.efftrain_ds.attention_packed_backward, (dout, qkv.detach(), out, lse, *options)
    three = (q.detach(), k.detach(), v.detach())
    yield torch.ops.efftrain_ds.attention_unpacked_backward, (dout, *three, out, lse, *options)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kernel", ["reference", pytest.param("list", marks=needs_gpu)])
def test_opcheck(kernel, masked):
    for operator, arguments in list(samples(kernel, masked))[: 4 if masked else 1]:
        done = torch.library.opcheck(operator.default, arguments)
        assert set(done.values()) == {"SUCCESS"}
        assert len(done) == 4


@pytest.mark.parametrize("kernel", KERNEL_ROUTES)
def test_opcheck_of_the_kernels(kernel):
    qkv, mask = packed(n=16, heads=1, dtype=torch.float16 if GPU else torch.float32), block_mask(heads=1, n=16)
    arguments = (qkv, *op._lists(mask), 16, 0.3, kernel, False)
    torch.library.opcheck(torch.ops.efftrain_ds.attention_packed.default, arguments)


class Core(nn.Module):
    def __init__(self, mask: BlockMask, route: str) -> None:
        super().__init__()
        self.linear, self.mask, self.route = nn.Linear(DIM, 3 * DIM), mask, route

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.linear(x).view(*x.shape[:2], 3, 1, DIM)
        return attention(qkv, self.mask, route=self.route).reshape(x.shape)


@pytest.mark.parametrize("route", ["reference", "sdpa", *KERNEL_ROUTES])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_masks_change_under_compile_without_a_recompile(route, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(BlockMask, "_counts", None)  # nothing may read the mask on the host
    mask = block_mask(heads=1, n=20)
    core = Core(mask, route).to(DEVICE, torch.float16 if GPU else torch.float32)  # fp16: the resident kernels' type
    compiled = torch.compile(core, fullgraph=True, backend=BACKEND)
    x = torch.randn(1, 20, DIM, device=DEVICE, dtype=core.linear.weight.dtype, requires_grad=True)
    # the interpreter is slow: there the reference stands for the eager run
    slow = not GPU and route in ("list", "resident")
    eager = Core(mask, "reference" if slow else route)
    eager.linear = core.linear
    seen = []
    for pattern in (0b0110, 0b1001, 0b1111, 0b0001, 0b1011):
        bits = torch.tensor(pattern, device=DEVICE) >> torch.arange(4, device=DEVICE)
        mask.update_((bits & 1).bool().view(1, 2, 2))
        results = []
        for function in (compiled, eager):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), [x, core.linear.weight])))
        for ours, wanted in zip(*results, strict=True):
            # inductor may fuse and round the linear's surroundings in another way
            assert torch.equal(ours, wanted) if not (slow or GPU) else relative_error(ours, wanted) < LIMIT[ours.dtype]
        seen.append(results[0][0])
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]), "results follow the mask"


@pytest.mark.parametrize("route", ["sdpa", pytest.param("list", marks=needs_gpu)])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_symbolic_shapes(route, masked):
    """Images, tokens, heads and head dim are unknown to the compiled code; a mask makes its number of tokens known."""
    torch._dynamo.reset()
    mask = block_mask(n=20) if masked else None
    compiled = torch.compile(
        lambda x: attention(x * 1.0, mask, route=route), fullgraph=True, backend=BACKEND, dynamic=True
    )
    shapes = ((2, 20), (3, 20), (5, 20)) if masked else ((2, 20), (3, 21), (5, 33))
    for batch, n in shapes:
        qkv = packed(batch, n, dtype=torch.float32)
        out = compiled(qkv)
        (grad,) = torch.autograd.grad((out * weights(out)).sum(), qkv)
        for found, wanted in zip((out, grad), exact(qkv, mask), strict=True):
            assert relative_error(found, wanted) < LIMIT[torch.float32]
    # SDPA's choice of backends on a GPU may bring guards of its own
    with torch._dynamo.config.patch(error_on_recompile=not (GPU and route == "sdpa")):
        again = packed(7, 20 if masked else 40, dtype=torch.float32)
        assert relative_error(compiled(again), exact(again, mask)[0]) < LIMIT[torch.float32]
    if not masked:
        wider = packed(dim=24 if route == "sdpa" else 32, dtype=torch.float32)  # another D is other code
        assert relative_error(compiled(wider), exact(wider, mask)[0]) < LIMIT[torch.float32]
        q, k, v = (packed(2, n, dtype=torch.float32).select(2, 0) for n in (20, 9, 9))
        separate = torch.compile(
            lambda *x: attention_qkv(*x, route=route), fullgraph=True, backend=BACKEND, dynamic=True
        )
        assert relative_error(separate(q, k, v), attention_qkv(q, k, v, route="reference")) < LIMIT[torch.float32]


@pytest.mark.parametrize("route", ["reference", "sdpa", *KERNEL_ROUTES])
def test_checkpointed_equals_plain(route):
    qkv, mask = packed(n=17, heads=1, dtype=torch.float16 if GPU else torch.float32), block_mask(heads=1, n=17)
    plain = run(qkv, mask, route)
    out = checkpoint(lambda x: attention(x, mask, route=route), qkv, use_reentrant=False)
    (grad,) = torch.autograd.grad((out * weights(out)).sum(), qkv)
    assert torch.equal(out, plain[0])
    assert torch.equal(grad, plain[1])


def test_selective_checkpoint_computes_attention_once(monkeypatch):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn

    def policy(ctx, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if function in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

    calls, forward = [], operators._run_forward
    monkeypatch.setattr(operators, "_run_forward", lambda *arguments: calls.append(1) or forward(*arguments))
    qkv, mask = packed(dtype=torch.float32), block_mask()

    def counted(context_fn):
        calls.clear()
        out = checkpoint(
            lambda x: attention(x * 2, mask, route="reference").sin(), qkv, use_reentrant=False, context_fn=context_fn
        )
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        return grad, len(calls)

    selective, once = counted(lambda: create_selective_checkpoint_contexts(policy))
    whole, twice = counted(noop_context_fn)
    assert (once, twice) == (1, 2)
    (plain,) = torch.autograd.grad(attention(qkv * 2, mask, route="reference").sin().sum(), qkv)
    assert torch.equal(selective, plain)
    assert torch.equal(whole, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_autocast(dtype, route):
    small = GPU or route in ("reference", "sdpa")
    qkv = packed(n=20 if small else 16, heads=2 if small else 1, dtype=torch.float32)
    mask = block_mask() if small else block_mask(heads=1, n=16)
    with torch.autocast(DEVICE, dtype):
        out = attention(qkv, mask, route=route)
        q, k, v = qkv.unbind(2)
        separate = attention_qkv(q.to(dtype), k, v, mask, route=route)  # a norm may return fp32 beside 16-bit values
    assert out.dtype == separate.dtype == dtype
    assert torch.equal(out, attention(qkv.to(dtype), mask, route=route))
    assert torch.equal(out, separate)
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert grad.dtype == torch.float32
    if route != "resident" or INTERPRETED:  # its kernels take 16-bit types on a GPU
        with torch.autocast(DEVICE, dtype, enabled=False):
            assert attention(qkv, mask, route=route).dtype == torch.float32


def test_second_derivatives_are_refused():
    qkv = packed(dtype=torch.float32)
    (grad,) = torch.autograd.grad(attention(qkv, block_mask(), route="reference").sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_mask_changed_between_forward_and_backward_is_refused():
    qkv, mask = packed(dtype=torch.float32), block_mask()
    out = attention(qkv, mask, route="reference")
    mask.update_(~mask.keep)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_flops_and_meta_tensors():
    q, k, v = (torch.empty(2, n, 3, 8, device="meta", requires_grad=True) for n in (10, 6, 6))
    with FlopCounterMode(display=False) as counter:
        attention_qkv(q, k, v).sum().backward()
        attention(torch.empty(2, 10, 3, 3, 8, device="meta")).sum()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3 * 10 * 6 * 8 + 4 * 2 * 3 * 10 * 10 * 8


@needs_gpu
def test_no_host_sync():
    qkv, mask = packed(n=300, dtype=torch.bfloat16), block_mask(n=300, block=64)
    run(qkv, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask.update_(~mask.keep)
        run(qkv, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize(("route", "n"), [("list", 300), ("resident", 197)])
def test_captured_graph_follows_the_mask(route, n):
    """Forward and backward captured once; masks are updated between replays."""
    qkv, mask = packed(2, n, dtype=torch.bfloat16), block_mask(n=n, block=64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            out = attention(qkv, mask, route=route)
            factor = weights(out)
            torch.autograd.grad(out, qkv, factor)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(qkv, mask, route=route)
        (grad,) = torch.autograd.grad(out, qkv, factor)
    seen = []
    for seed in range(5):
        mask.update_(block_mask(n=n, block=64, seed=seed).keep)
        graph.replay()
        seen.append(out.detach().clone())
        for found, wanted in zip((out, grad), run(qkv, mask, route), strict=True):
            assert torch.equal(found, wanted)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("route", ["list", "resident"])
def test_tensors_of_another_device_than_the_current_one(route):
    qkv, mask = packed(dtype=torch.float16), block_mask()
    wanted = run(qkv, mask, route)
    other = qkv.detach().to("cuda:1").requires_grad_()
    assert torch.cuda.current_device() == 0
    for found, expected in zip(run(other, mask.to("cuda:1"), route), wanted, strict=True):
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.cpu(), expected.cpu())


@needs_kernels
def test_launches_make_the_device_of_the_tensors_current(monkeypatch):
    inside = []

    @contextmanager
    def current(device):
        inside.append(device)
        yield
        inside.append(None)

    monkeypatch.setattr(operators, "_current", current)
    for name in ("forward", "backward"):
        kernel = getattr(lists, name)
        monkeypatch.setattr(
            lists, name, lambda *a, kernel=kernel, name=name: (inside.append(name), kernel(*a)) and None
        )
    qkv = packed(n=16, heads=1, dtype=torch.float32)
    run(qkv, None, "list")
    assert inside == [qkv.device, "forward", None, qkv.device, "backward", None]


# ---- choice


@needs_kernels
def test_tf32_is_for_the_kernels():
    qkv = packed(n=16, heads=1, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        used = []
        for name in ("forward", "backward"):
            patch.setattr(lists, name, lambda *arguments: used.append(arguments[-1].precision))
        for tf32 in (True, False):
            out = attention(qkv, route="list", tf32=tf32)
            torch.autograd.grad(out, qkv, torch.zeros_like(out))
        attention(qkv, tf32=True)
    assert used == ["tf32", "tf32", "ieee", "ieee"], "fp32 runs in SDPA unless the kernels are named"
    if GPU:
        qkv = packed(n=300, dtype=torch.float32)
        wanted = exact(qkv, None)[0]
        full, short = (relative_error(attention(qkv, route="list", tf32=tf32), wanted) for tf32 in (False, True))
        assert full < 2e-6 < short < 2e-3


def test_environment_wins_over_the_argument(monkeypatch):
    qkv, mask = packed(dtype=torch.float32), block_mask()
    monkeypatch.setenv(runtime.VARIABLE, "reference")
    assert _route(qkv, mask, "sdpa") == "reference"
    assert _route(qkv, mask, "list") == "reference"
    monkeypatch.setenv(runtime.VARIABLE, "both")
    with pytest.raises(ValueError, match="EFFTRAIN_KERNELS"):
        attention(qkv, mask)


@needs_kernels
def test_forced_kernels(monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, "triton")
    qkv, mask = packed(dtype=torch.float32), block_mask()
    assert _route(qkv, mask, "auto") == _route(qkv, mask, "sdpa") == "auto"
    assert _route(qkv, mask, "list") == "list"
    with pytest.raises(ValueError, match="head dim 24"):
        attention(packed(dim=24, dtype=torch.float32), mask)
    monkeypatch.delenv(runtime.VARIABLE)
    assert attention(packed(dim=24, dtype=torch.float32), mask).shape == (1, 20, 2, 24), "else SDPA takes it"


@pytest.mark.skipif(GPU, reason="a CPU without kernels")
def test_kernels_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(runtime, "why_not", lambda *_: "no GPU")
    assert _route(packed(), None, "auto") == "sdpa"
    with pytest.raises(RuntimeError, match="route='list', but attention cannot run its kernels: no GPU"):
        attention(packed(), route="list")
    monkeypatch.setenv(runtime.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="EFFTRAIN_KERNELS=triton"):
        attention(packed())


def _route(qkv: torch.Tensor, mask: BlockMask | None, route: str) -> str:
    return op._kind(qkv, qkv.shape[1], qkv.shape[1], qkv.shape[-1], mask, route)


def test_route_for_a_mask_follows_its_sparsity():
    mask = BlockMask(torch.ones(1, 10, 10, dtype=torch.bool, device=DEVICE), 577, 577, 64)
    assert route_for(mask, torch.bfloat16, 64) == "sdpa"
    keep = mask.keep.clone()
    keep[:, :, :4] = False
    assert route_for(mask.update_(keep), torch.bfloat16, 64) == "auto"
    assert route_for(None, torch.bfloat16, 64) == "auto"
    assert route_for(mask, torch.bfloat16, 24) == "auto", "no kernels, so nothing to choose"


# ---- checks

BAD = [
    (lambda: attention(torch.zeros(1, 20, 6, 16)), r"\[B, N, 3, H, D\]"),
    (lambda: attention(torch.zeros(1, 20, 2, 2, 16)), r"\(1, 20, 2, 2, 16\)"),
    (lambda: attention(torch.zeros(1, 20, 3, 2, 16, dtype=torch.int32)), "int32"),
    (lambda: attention(torch.zeros(1, 20, 3, 16, 2).transpose(3, 4)), "contiguous"),
    (lambda: attention(torch.zeros(1, 20, 3, 2, 16), scale=-1.0), "scale must be > 0"),
    (lambda: attention(torch.zeros(1, 20, 3, 2, 16), route="fast"), "route is one of"),
    (lambda: attention(torch.zeros(1, 300, 3, 2, 16), route="resident"), "up to 256 tokens"),
    (lambda: attention(torch.zeros(1, 21, 3, 2, 16), block_mask().cpu()), "20 queries and 20 keys"),
    (lambda: attention(torch.zeros(1, 20, 3, 3, 16), block_mask().cpu()), "2 heads"),
    (lambda: attention(torch.zeros(1, 20, 3, 2, 16), block_mask().to("meta")), "is on meta"),
    (lambda: attention_qkv(*(torch.zeros(1, n, 2, 16) for n in (20, 9, 8))), "k and v"),
    (lambda: attention_qkv(torch.zeros(1, 9, 2, 8), *[torch.zeros(1, 9, 2, 16)] * 2), "found shapes"),
    (lambda: attention_qkv(torch.zeros(1, 9, 2, 16).half(), *[torch.zeros(1, 9, 2, 16)] * 2), "one dtype and device"),
]


@pytest.mark.parametrize(("call", "text"), BAD)
def test_bad_input_is_refused_before_any_launch(call, text, monkeypatch):
    monkeypatch.setattr("efftrain_ds.kernels.attention.operators._run_forward", None)
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("side", ["", "reference", pytest.param("triton", marks=needs_kernels)])
def test_self_test(side, monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, side)
    ran = []
    for kernels in (lists, resident) if INTERPRETED or GPU else ():
        for name in ("forward", "backward"):
            kernel = getattr(kernels, name)
            monkeypatch.setattr(
                kernels, name, lambda *a, kernel=kernel, home=kernels: (ran.append(home), kernel(*a)) and None
            )
    said = attention_self_test(DEVICE)
    assert "error" in said
    assert ("list and resident kernels" in said) is (side == "triton" or (GPU and side == ""))
    assert set(ran) == ({lists, resident} if "kernels" in said else set())
    monkeypatch.setattr("efftrain_ds.kernels.attention.check.LIMIT", dict.fromkeys((torch.float32, torch.bfloat16), -1))
    with pytest.raises(RuntimeError, match="attention is off"):
        attention_self_test(DEVICE)
