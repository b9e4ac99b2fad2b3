"""The crop's Triton kernel: compiled on a GPU, interpreted elsewhere."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from efftrain_ds.kernels import runtime
from efftrain_ds.kernels.lowfreq_crop import crop_matrix, lowfreq_crop, resample, self_test
from efftrain_ds.kernels.lowfreq_crop.fused import crop_op
from efftrain_ds.kernels.lowfreq_crop.reference import fourier_crop
from efftrain_ds.kernels.lowfreq_crop.tiles import crop_operands, padded_sizes, resample_operands, tiles, too_large
from tests.kernels.common import DEVICE, GPU, INTERPRETED, needs_gpu, needs_kernels, relative_error

pytestmark = needs_kernels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BF16_LIMIT = 2e-3 if GPU else 4e-3  # the interpreter truncates
SIZES = [((32, 32), (20, 20)), ((30, 30), (18, 18)), ((30, 47), (18, 20))]
SIZES += [pytest.param((224, 224), (b, b), marks=needs_gpu) for b in (96, 128, 160, 192)]
SIZES += [
    pytest.param(shape, size, marks=needs_gpu)
    for shape, size in (((256, 256), (128, 128)), ((224, 160), (96, 64)), ((600, 90), (210, 88)))
]


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("EFFTRAIN_KERNELS", "triton")


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8).to(DEVICE)


def normalised(x):
    """Grey levels to the scale of normalised images."""
    mean, std = (torch.tensor(v, dtype=torch.float64, device=x.device).view(-1, 1, 1) for v in (MEAN, STD))
    return (x.double() / 255 - mean) / std


def wave(size, cycles_h, cycles_w, amplitude):
    k = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    values = 128 + amplitude * torch.cos(cycles_h * k[:, None] + cycles_w * k[None, :])
    return values.round().clamp(0, 255).to(torch.uint8)[None, None].to(DEVICE)


def launched(x, size, align="center", exact=True, flip=None, **options):
    """The kernel without its checks, into a poisoned buffer; float64 images are computed in float64."""
    from efftrain_ds.kernels.lowfreq_crop.triton_fwd import launch

    exactly = x.dtype == torch.float64
    kinds = (torch.float64, torch.float64) if exactly else (torch.float16, torch.float32)
    operands = crop_operands(tuple(x.shape[2:]), size, align, exact, *kinds, x.device)
    ones = torch.ones(x.shape[1], dtype=kinds[1], device=x.device)
    out = torch.full((*x.shape[:2], *size), float("nan"), dtype=kinds[1], device=x.device)
    launch(x, operands, flip, ones, torch.zeros_like(ones), out, **options)
    return out


@pytest.mark.skipif(not INTERPRETED, reason="float64 tiles do not fit a GPU; the interpreter tests the logic")
@pytest.mark.parametrize(
    ("shape", "size", "resident", "align", "exact"),
    [
        ((32, 32), (20, 20), True, "center", True),
        ((32, 32), (20, 20), True, "grid", True),
        ((32, 32), (20, 20), True, "grid", False),
        ((32, 32), (20, 20), False, "grid", True),
        ((30, 30), (18, 18), False, "center", True),
        ((30, 30), (18, 18), False, "center", False),
        ((47, 34), (18, 34), True, "center", True),  # an odd side; nothing to do along the other
        ((210, 32), (70, 16), True, "center", True),  # three pieces of rows, two row tiles
        ((390, 17), (18, 16), True, "grid", True),  # too many rows to keep the operand
        ((16, 99), (8, 66), True, "grid", True),  # two pieces of columns
        ((16, 210), (8, 200), True, "center", True),  # two column tiles
    ],
)
def test_logic_in_float64(shape, size, resident, align, exact):
    x = noise(2, 1, *shape).double()
    flip = torch.tensor([True, False])
    mirrored = torch.where(flip[:, None, None, None], x.flip(-1), x)
    out = launched(x, size, align, exact, flip, resident=resident)
    if exact:
        assert relative_error(out, fourier_crop(mirrored, size, align)) < 1e-12
    p, q = (crop_matrix(s, b, align, torch.float64).p for s, b in zip(shape, size, strict=True))
    if not exact:
        assert relative_error(out, p @ mirrored @ q.T) < 1e-12


@pytest.mark.parametrize("align", ["center", "grid"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_equals_fourier_definition(shape, size, align):
    x = noise(8 if GPU else 1, 3, *shape)
    expected = normalised(fourier_crop(x, size, align))
    for dtype, limit in ((torch.float32, 5e-4), (torch.float16, 7e-4), (torch.bfloat16, BF16_LIMIT)):
        out = lowfreq_crop(x, size, align=align, mean=MEAN, std=STD, out_dtype=dtype)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert relative_error(out, expected) < limit
        if dtype == torch.float32:
            assert (out - expected).abs().max() < 4e-3


def test_full_size_image():
    x = noise(1, 1, 224, 224)
    assert relative_error(launched(x, (160, 96)) - 128, fourier_crop(x, (160, 96)) - 128) < 5e-4


def test_flags_flip_the_input():
    x = noise(3, 1, 32, 64)
    flip = torch.tensor([True, False, True], device=DEVICE)
    mirrored = torch.where(flip[:, None, None, None], x.flip(-1), x)
    for align in ("center", "grid"):
        out = lowfreq_crop(x, (20, 34), align=align, flip=flip)
        torch.testing.assert_close(out, lowfreq_crop(mirrored, (20, 34), align=align), rtol=0, atol=0.1)
        assert relative_error(out - 128, fourier_crop(mirrored, (20, 34), align) - 128) < 5e-4
    assert (out - lowfreq_crop(x, (20, 34), align="grid").flip(-1)).abs().max() > 1  # not a flip of the result


@pytest.mark.parametrize("op", [lowfreq_crop, resample])
@pytest.mark.parametrize("flipped", [False, True])
def test_same_formula_as_in_torch(op, flipped, monkeypatch):
    x = noise(2, 3, 30, 48)
    flip = torch.tensor([True, False], device=DEVICE) if flipped else None
    size = (18, 20) if op is lowfreq_crop else (17, 31)
    out = op(x, size, flip=flip, mean=MEAN, std=STD)
    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    torch.testing.assert_close(out, op(x, size, flip=flip, mean=MEAN, std=STD), rtol=0, atol=4e-3)
    on_cpu = op(x.cpu(), size, flip=None if flip is None else flip.cpu(), mean=MEAN, std=STD)
    assert relative_error(out.cpu(), on_cpu) < 5e-4


def test_nothing_changes_at_full_size():
    x = noise(2, 3, 32, 32)
    out = lowfreq_crop(x, 32, mean=MEAN, std=STD)
    torch.testing.assert_close(out.double(), normalised(x), rtol=0, atol=1e-5)
    assert lowfreq_crop(x, 32, out_dtype=torch.float32).equal(x.float())
    flip = torch.tensor([False, True], device=DEVICE)
    assert lowfreq_crop(x, 32, flip=flip)[1].equal(x[1].flip(-1).float())


@pytest.mark.parametrize("value", [0, 37, 255])
def test_constants_are_kept(value):
    x = torch.full((1, 3, 48, 64), value, dtype=torch.uint8, device=DEVICE)
    out = lowfreq_crop(x, (20, 34), mean=MEAN, std=STD)
    torch.testing.assert_close(out.double(), normalised(x[..., :20, :34]), rtol=0, atol=1e-3)


def test_frequencies_below_the_cut_stay_and_others_vanish():
    for cycles_h, cycles_w in ((3, 0), (0, 9), (5, 8)):
        out = lowfreq_crop(wave(64, cycles_h, cycles_w, 100), 32, align="grid").double() - 128
        k = torch.arange(32, dtype=torch.float64, device=DEVICE) * (2 * math.pi / 32)
        expected = torch.cos(cycles_h * k[:, None] + cycles_w * k[None, :])
        assert ((out * expected).sum() / expected.square().sum()).item() == pytest.approx(100, rel=1e-3)
    above = lowfreq_crop(wave(64, 0, 32, 100), 32).double() - 128  # alternates: exact in 8 bits
    assert above.abs().max() < 0.1


def test_nyquist_term():
    # Both frequencies at the new Nyquist: without the rank-one term it is off by a quarter of the amplitude.
    x = wave(32, 8, 8, 127)
    expected = fourier_crop(x, (16, 16), "grid")
    assert (lowfreq_crop(x, 16, align="grid") - expected).abs().max() < 0.1
    assert (lowfreq_crop(x, 16, align="grid", exact=False) - expected).abs().max() > 31
    # and it is mirrored with the image
    flip = torch.tensor([True], device=DEVICE)
    mirrored = lowfreq_crop(x.flip(-1), 16, align="grid", flip=flip)
    torch.testing.assert_close(mirrored.double(), expected, rtol=0, atol=0.1)


def test_linear():
    x = noise(1, 2, 30, 30)
    total = lowfreq_crop(x, 18) + lowfreq_crop(255 - x, 18)
    torch.testing.assert_close(total, torch.full_like(total, 255), rtol=0, atol=0.1)


def test_memory_formats():
    x = noise(1, 3, 32, 48)
    expected = lowfreq_crop(x, (20, 34))
    forms = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every second row": x.repeat_interleave(2, 2)[:, :, ::2],
        "one byte off": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "one channel for all": x[:, :1].expand(1, 3, 32, 48),
    }
    assert not forms["channels last"].is_contiguous()
    for name, form in forms.items():
        wanted = expected if name != "one channel for all" else expected[:, :1].expand_as(expected)
        torch.testing.assert_close(lowfreq_crop(form, (20, 34)), wanted, rtol=0, atol=0.05, msg=name)


def test_repeats_are_equal_bit_for_bit():
    x = noise(8 if GPU else 1, 1, 32, 48)
    first = lowfreq_crop(x, 18)
    assert all(lowfreq_crop(x, 18).equal(first) for _ in range(4))


def test_kept_and_reread_operand_agree():
    x = noise(1, 1, 224, 64)
    torch.testing.assert_close(
        launched(x, (66, 18), resident=True), launched(x, (66, 18), resident=False), rtol=0, atol=0.05
    )


def test_forms_of_the_architectures():
    from efftrain_ds.kernels.lowfreq_crop import triton_fwd

    x = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    for capability, wide in (((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False), ((13, 0), False)):
        arch = runtime.architecture(capability)
        assert triton_fwd.keeps(x, arch) is wide
        assert triton_fwd.options(arch)["num_warps"] == (4 if wide else 8)


def test_no_images():
    assert lowfreq_crop(noise(0, 3, 32, 32), 20).shape == (0, 3, 20, 20)


@pytest.mark.parametrize("height", [*range(1, 390, 7), 224, 256, 384, 385, 600])
def test_tiles_cover_the_plane(height):
    for rows in {1, max(1, height // 2), height}:
        for resident in (True, False):
            plan = tiles(height, height, rows, rows, resident, not resident)
            left_rows, inner, width, columns = padded_sizes(height, height, rows, rows)
            sides = [side for side in (*plan.k, *plan.n) if side]
            assert all(side >= 16 and side & (side - 1) == 0 for side in sides)
            covered = -(-height // plan.k[0]) * plan.k[0] if plan.loop else sum(plan.k)
            assert height <= covered <= inner
            assert height <= width
            assert plan.masked or covered == height == width
            assert plan.row_tiles * 64 == left_rows >= rows
            assert plan.column_tiles * sum(plan.n) == columns >= rows
            assert sum(plan.n) <= 192


def test_what_the_kernel_does_not_take(monkeypatch):
    x = noise(1, 3, 32, 32)
    cases = {
        "even sizes, found 17 x 20": lambda: lowfreq_crop(x, (17, 20)),
        "takes uint8": lambda: lowfreq_crop(x.float(), 20),
        "torch.float64": lambda: lowfreq_crop(x, 20, out_dtype=torch.float64),
    }
    for text, call in cases.items():
        with pytest.raises(RuntimeError, match=text):
            call()
    monkeypatch.delenv("EFFTRAIN_KERNELS")
    assert lowfreq_crop(x, (17, 20)).shape == (1, 3, 17, 20)
    z = x.float().requires_grad_()
    lowfreq_crop(z, 20).sum().backward()
    assert z.grad is not None


def operation(**changed):
    x = noise(2, 3, 32, 32)
    operands = crop_operands((32, 32), (20, 20), "center", True, torch.float16, torch.float32, DEVICE)
    arguments = {"x": x, **operands._asdict(), "flip": torch.tensor([True, False], device=DEVICE)}
    arguments |= {"scale": torch.ones(3, device=DEVICE), "shift": torch.zeros(3, device=DEVICE)}
    arguments |= {"rows": 20, "columns": 20, "dtype": torch.float32}
    return tuple((arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"rows": 19}, "even sizes, found 19 x 20"),
        ({"columns": 34}, "cannot crop 32 x 32 pixels to 20 x 34"),
        ({"x": torch.zeros(2, 3, 32, 32)}, "uint8 images"),
        ({"x": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "uint8 images"),
        ({"dtype": torch.float64}, "float64"),
        ({"left": torch.zeros(64, 32)}, "left is contiguous torch.float16"),
        ({"right": torch.zeros(32, 64, dtype=torch.float16)}, r"right is contiguous torch.float16 \[32, 32\]"),
        ({"nyquist_h": None}, "together"),
        ({"flip": torch.zeros(3, dtype=torch.bool)}, "flip"),
        ({"flip": torch.zeros(2)}, "flip"),
        ({"scale": torch.ones(1)}, "scale"),
        ({"shift": torch.zeros(3, device="meta")}, "shift is on meta"),
    ],
)
def test_bad_arguments_of_the_operation(changed, text):
    with pytest.raises(ValueError, match=text):
        crop_op(
            *operation(**{k: v.to(DEVICE) if hasattr(v, "to") and not v.is_meta else v for k, v in changed.items()})
        )


@pytest.mark.parametrize(
    "flip", [torch.zeros(3, dtype=torch.bool), torch.zeros(2), torch.zeros(2, dtype=torch.bool, device="meta")]
)
def test_bad_flags(flip):
    with pytest.raises(ValueError, match=r"flip is bool \[2\]"):
        lowfreq_crop(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 4, flip=flip)


def test_operation_is_well_formed():
    torch.library.opcheck(crop_op, operation())
    operands = resample_operands((32, 32), (19, 20), "lanczos", torch.float16, DEVICE)
    torch.library.opcheck(
        crop_op, operation(**operands._asdict(), flip=None, rows=19), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_in_one_graph():
    def reduce(x, flip):
        y = lowfreq_crop(x, 20, flip=flip, mean=MEAN, std=STD, out_dtype=torch.bfloat16)
        return y * 2, resample(x, 17)

    torch._dynamo.reset()
    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(2):
            x, flip = noise(2, 3, 32, 32, seed=i), torch.tensor([i == 0, i == 1], device=DEVICE)
            for found, expected in zip(compiled(x, flip), reduce(x, flip), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "dynamic"),
    [
        pytest.param("triton", None, marks=pytest.mark.slow),
        pytest.param("triton", True, marks=pytest.mark.slow),
        ("reference", None),
        pytest.param("reference", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_graph_for_each_size(side, dynamic, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    def reduce(x, size, flip):
        return lowfreq_crop(x, size, flip=flip, mean=MEAN, std=STD), resample(x, size)

    monkeypatch.setenv("EFFTRAIN_KERNELS", side)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(reduce, fullgraph=True, backend=counter, dynamic=dynamic)
    # images, input side, output side, and whether a graph is made: for another number of images the first time at most
    steps = [(2, 24, 12, True), (3, 24, 12, dynamic is None), (4, 24, 12, False), (2, 32, 12, True)]
    steps += [(3, 32, 16, True), (5, 32, 16, False), (4, 24, 12, False)]
    for images, before, after, another in steps:
        graphs = counter.frame_count
        x, flip = noise(images, 3, before, before), torch.arange(images, device=DEVICE) % 2 == 0
        for found, expected in zip(compiled(x, after, flip), reduce(x, after, flip), strict=True):
            assert found.shape[-1] == after
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert (counter.frame_count > graphs) == another, (images, before, after)
    torch._dynamo.reset()


def test_operands_on_a_gpu_are_never_dropped(monkeypatch):
    # a captured graph reads them at their address
    from efftrain_ds.kernels.lowfreq_crop import matrices

    built = []

    def build(number, device):
        built.append((number, device))
        return torch.zeros(1)

    monkeypatch.setattr(matrices, "_KEPT", 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    get = matrices.kept(build)
    first = get(0, "cuda")
    assert get(0, "cuda:1") is first
    assert get(0, "cuda:0") is not first
    for number in range(9):
        get(number, "cpu")
        get(number, "cuda:1")
    assert get(0, "cuda") is first
    assert [number for number, device in built if device.startswith("cuda") and number == 0] == [0, 0]
    assert built.count((0, "cpu")) == 1
    get(0, "cpu")
    assert built.count((0, "cpu")) == 2  # those on the CPU are dropped


def test_planes_that_reach_beyond_32_bits():
    # offsets inside of a plane have 32 bits; the pages between these rows are never touched
    side, apart = 4, 2**30
    memory = torch.empty(3 * apart + side, dtype=torch.uint8, device=DEVICE)
    x = memory.as_strided((1, 1, side, side), (0, 0, apart, 1))
    x.copy_(noise(1, 1, side, side))
    torch.testing.assert_close(lowfreq_crop(x, 2), lowfreq_crop(x.contiguous(), 2), rtol=0, atol=0)
    assert "less than 2^31" in too_large(50_000, 50_000, 32, 32)
    assert "less than 2^31" in too_large(1, 60_000, 1, 50_000)
    assert too_large(40_000, 40_000, 32, 32) is None


def test_fake_tensors_are_not_kept():
    with FakeTensorMode():
        assert type(crop_matrix(26, 14).p) is not torch.Tensor
        assert lowfreq_crop(torch.empty(2, 3, 26, 26, dtype=torch.uint8, device=DEVICE), 14).shape == (2, 3, 14, 14)
    kept = crop_matrix(26, 14)
    assert all(type(part) is torch.Tensor for part in kept)
    with torch.inference_mode():
        assert not crop_matrix(26, 16).p.is_inference()
    with FakeTensorMode():
        assert type(crop_matrix(26, 14).p) is not torch.Tensor
    assert crop_matrix(26, 14).p is kept.p


def test_self_test(monkeypatch):
    assert self_test(DEVICE).startswith(f"Triton kernel on {DEVICE}, relative error ")
    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    assert self_test(DEVICE).startswith("matrix products of torch")
    monkeypatch.setattr("efftrain_ds.kernels.lowfreq_crop.check.lowfreq_crop", lambda x, *_, **__: x[..., :20, :20] / 3)
    with pytest.raises(RuntimeError, match="is off by"):
        self_test(DEVICE)


@needs_gpu
def test_graph_capture_and_no_waiting():
    x, flip = noise(8, 3, 224, 224), torch.arange(8, device=DEVICE) % 2 == 0
    expected = lowfreq_crop(x, 96, flip=flip, mean=MEAN, std=STD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lowfreq_crop(x, 96, flip=flip, mean=MEAN, std=STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lowfreq_crop(x, 96, flip=flip, mean=MEAN, std=STD)
    out.fill_(float("nan"))
    graph.replay()
    assert out.equal(expected)
    flip.logical_not_()
    graph.replay()
    assert out.equal(lowfreq_crop(x, 96, flip=flip, mean=MEAN, std=STD))


@needs_gpu
def test_offsets_beyond_32_bits():
    x = torch.zeros(15_000, 3, 224, 224, dtype=torch.uint8, device=DEVICE)
    x[-1] = noise(3, 224, 224)
    out = lowfreq_crop(x, 96, out_dtype=torch.bfloat16)
    torch.testing.assert_close(out[-1:], lowfreq_crop(x[-1:].clone(), 96, out_dtype=torch.bfloat16), rtol=0, atol=0)
    assert not out[:-1].any()
