import math

import numpy as np
import pytest
import torch
from PIL import Image

from efftrain_ds.kernels.lowfreq_crop import crop_matrix, lowfreq_crop, resample, resample_matrix
from efftrain_ds.kernels.lowfreq_crop.reference import fourier_crop, matmul_crop

SIZES = [
    ((224, 224), (96, 96)),
    ((224, 224), (128, 128)),
    ((224, 224), (160, 160)),
    ((224, 224), (192, 192)),
    ((225, 225), (96, 96)),
    ((225, 224), (224, 223)),
    ((224, 192), (96, 128)),
    ((224, 224), (97, 97)),
    ((97, 64), (31, 32)),
    ((33, 33), (33, 16)),
    ((32, 32), (16, 16)),
    ((28, 28), (12, 12)),
    ((7, 9), (1, 2)),
]
ALIGN = ("center", "grid")


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    """These are the tests of plain torch, whatever the environment asks for."""
    monkeypatch.delenv("EFFTRAIN_KERNELS", raising=False)


def noise(*shape, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def rms(x):
    return x.square().mean().sqrt().item()


def cosine(size, cycles, phase=0.0, dim=-1):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(size, dtype=torch.float64) / size + phase)
    return (wave.expand(size, size) if dim == -1 else wave[:, None].expand(size, size))[None, None]


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_equals_fourier_definition(shape, size, align):
    x = noise(1, 2, *shape)
    expected = fourier_crop(x, size, align)
    assert expected.shape[-2:] == size
    torch.testing.assert_close(lowfreq_crop(x, size, align=align), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lowfreq_crop(x.float(), size, align=align).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("align", ALIGN)
def test_oracle_by_explicit_sums(align):
    # The oracle itself against the textbook sum, one dimension at a time.
    x, b, n = noise(6, 8), 4, 8
    offset = 0.5 if align == "center" else 0.0
    u = torch.arange(-b // 2, b // 2, dtype=torch.float64)

    def operator(size_in):
        out, inp = torch.arange(b, dtype=torch.float64), torch.arange(size_in, dtype=torch.float64)
        theta = ((out + offset) / b)[:, None] - ((inp + offset) / size_in)[None]
        return torch.exp(2j * math.pi * u[:, None, None] * theta).sum(0) / size_in

    expected = (operator(6) @ x.to(torch.complex128) @ operator(n).T).real
    torch.testing.assert_close(fourier_crop(x, (b, b), align), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", ALIGN)
def test_full_size_is_identity(align):
    matrix = crop_matrix(32, 32, align, torch.float64)
    assert torch.equal(matrix.p, torch.eye(32, dtype=torch.float64))
    assert not matrix.q.any()
    x = noise(2, 3, 32, 32)
    assert lowfreq_crop(x, 32, align=align) is x
    torch.testing.assert_close(fourier_crop(x, (32, 32), align), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("exact", [True, False])
def test_constants_and_means_are_kept(align, exact):
    x = torch.full((1, 1, 224, 224), 7.25, dtype=torch.float64)
    y = lowfreq_crop(x, 96, align=align, exact=exact)
    torch.testing.assert_close(y, torch.full_like(y, 7.25), rtol=0, atol=1e-12)
    x = noise(2, 3, 225, 224)
    y = lowfreq_crop(x, (97, 96), align=align, exact=exact)
    torch.testing.assert_close(y.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", ALIGN)
def test_nyquist_term_is_small_but_needed(align):
    x = noise(1, 3, 224, 224)
    difference = (lowfreq_crop(x, 96, align=align, exact=False) - fourier_crop(x, (96, 96), align)).abs().max()
    assert 1e-5 < difference < 5e-3


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("dim", [-1, -2])
def test_aliasing(align, dim):
    for cycles in (1, 20, 40, 47):
        x = cosine(224, cycles, dim=dim)
        assert rms(lowfreq_crop(x, 96, align=align)) / rms(x) == pytest.approx(1.0, abs=1e-9)
    for cycles in (49, 56, 60, 90, 112):
        assert rms(lowfreq_crop(cosine(224, cycles, dim=dim), 96, align=align)) < 1e-12


@pytest.mark.parametrize(("phase", "amplitude"), [(0.0, 0.5), (0.7, 0.38242), (math.pi / 2, 0.0)])
def test_nyquist_amplitude_on_the_grid(phase, amplitude):
    y = lowfreq_crop(cosine(224, 48, phase), 96, align="grid")
    assert y.abs().max().item() == pytest.approx(amplitude, abs=1e-5)
    assert amplitude == pytest.approx(abs(math.cos(phase)) / 2, abs=1e-5)


def test_corner_of_the_spectrum():
    # The diagonal wave at both Nyquist frequencies: only the exact form tells it from its mirror image.
    n, b = 32, 16
    k = torch.arange(n, dtype=torch.float64)
    diagonal = torch.cos(math.pi * b / n * (k[:, None] + k[None, :]))[None, None]
    for x in (diagonal, diagonal.flip(-1)):
        expected = fourier_crop(x, (b, b), "grid")
        torch.testing.assert_close(lowfreq_crop(x, b, align="grid"), expected, rtol=0, atol=1e-12)
    # half of the wave: its frequency +B/2 is not kept, -B/2 is
    assert lowfreq_crop(diagonal, b, align="grid").abs().max() == pytest.approx(0.5)
    assert lowfreq_crop(diagonal, b, align="grid", exact=False).abs().max() == pytest.approx(0.25)


@pytest.mark.parametrize("align", ALIGN)
def test_energy_and_composition(align):
    # Odd sizes keep +-u pairs only, so the energy of the kept block survives and crops compose.
    x = noise(1, 1, 224, 224)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), (-2, -1)) / 224**2
    kept = spectrum[..., 112 - 48 : 112 + 49, 112 - 48 : 112 + 49].abs().square().sum().item()
    assert lowfreq_crop(x, 97, align=align).square().mean().item() == pytest.approx(kept, rel=1e-12)
    twice = lowfreq_crop(lowfreq_crop(x, 161, align=align), 97, align=align)
    torch.testing.assert_close(twice, lowfreq_crop(x, 97, align=align), rtol=0, atol=1e-12)


def test_shift():
    # 7 input pixels are 3 output pixels of 224 -> 96; band-limited below the Nyquist bins, which do not shift.
    p = crop_matrix(224, 95, "grid", torch.float64).p
    x = p.T @ noise(1, 1, 95, 95) @ p
    moved = lowfreq_crop(x.roll(7, -1), 96, align="grid")
    torch.testing.assert_close(moved, lowfreq_crop(x, 96, align="grid").roll(3, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", ALIGN)
def test_linear_and_commutes_with_normalisation(align):
    a, b = noise(2, 3, 64, 48), noise(2, 3, 64, 48).flip(0)
    mixed = lowfreq_crop(0.3 * a + 0.7 * b, (32, 24), align=align)
    parts = 0.3 * lowfreq_crop(a, (32, 24), align=align) + 0.7 * lowfreq_crop(b, (32, 24), align=align)
    torch.testing.assert_close(mixed, parts, rtol=0, atol=1e-12)
    before = lowfreq_crop((a - 0.45) / 0.22, (32, 24), align=align)
    torch.testing.assert_close(before, (lowfreq_crop(a, (32, 24), align=align) - 0.45) / 0.22, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(224, 224), (64, 97)])
def test_center_commutes_with_flips(shape):
    x = noise(1, 2, *shape)
    for dims in ((-1,), (-2,), (-1, -2)):
        a = lowfreq_crop(x.flip(dims), 32, exact=False)
        torch.testing.assert_close(a, lowfreq_crop(x, 32, exact=False).flip(dims), rtol=0, atol=1e-10)
    # The exact form keeps one of two mirror-image corner bins: only the double flip commutes.
    a = lowfreq_crop(x.flip(-1, -2), 32, exact=True)
    torch.testing.assert_close(a, lowfreq_crop(x, 32, exact=True).flip(-1, -2), rtol=0, atol=1e-10)
    grid = lowfreq_crop(x.flip(-1), 32, align="grid") - lowfreq_crop(x, 32, align="grid").flip(-1)
    assert grid.abs().max() > 1e-3


def test_centred_pattern_stays_centred():
    k = torch.arange(224, dtype=torch.float64) - 111.5
    blob = torch.exp(-(k[:, None] ** 2 + k[None, :] ** 2) / (2 * 20**2))[None, None]

    def centre(y):
        m = torch.arange(96, dtype=torch.float64) - 47.5
        return ((y * m).sum() / y.sum()).item(), ((y * m[:, None]).sum() / y.sum()).item()

    assert centre(lowfreq_crop(blob, 96)) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert centre(lowfreq_crop(blob, 96, align="grid")) == pytest.approx((2 / 7, 2 / 7), abs=1e-3)  # (1 - 96/224) / 2


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("align", ALIGN)
def test_uint8_affine(align, exact):
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    y = lowfreq_crop(x, 16, align=align, exact=exact, mean=mean, std=std)
    z = lowfreq_crop(x.double(), 16, align=align, exact=exact)
    expected = (z / 255 - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    half = lowfreq_crop(x, 16, align=align, exact=exact, mean=mean, std=std, out_dtype=torch.bfloat16)
    assert torch.equal(half, y.bfloat16())
    plain = lowfreq_crop(x, 16, align=align, exact=exact)
    torch.testing.assert_close(plain.double(), z, rtol=0, atol=1e-3)
    same = lowfreq_crop(x, 32, align=align, exact=exact, mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(same, (x.float() / 255 - 0.5) / 0.25, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.5), (torch.bfloat16, 3.0)])
@pytest.mark.parametrize("exact", [True, False])
def test_16_bit_products_on_8_bit_images(dtype, limit, exact):
    x = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal((x.to(dtype) - 128 + 128).to(torch.uint8), x) or dtype == torch.bfloat16
    assert torch.equal(x.to(dtype).to(torch.uint8), x)
    y = matmul_crop(x, (96, 96), exact=exact, compute_dtype=dtype)
    assert (y.double() - lowfreq_crop(x.double(), 96, exact=exact)).abs().max() <= limit


def test_16_bit_input_is_computed_in_fp32():
    x = noise(2, 3, 64, 64).bfloat16()
    y = lowfreq_crop(x, 32)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lowfreq_crop(x.float(), 32).bfloat16())


def test_memory_formats_and_gradient():
    x = torch.randint(0, 256, (2, 3, 32, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    hwc = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(lowfreq_crop(hwc, (16, 12)), lowfreq_crop(x, (16, 12)), rtol=0, atol=0)
    with torch.inference_mode():
        lowfreq_crop(x, (18, 14))  # fills the cache
    z = noise(1, 1, 32, 24, dtype=torch.float32).requires_grad_()
    y = lowfreq_crop(z, (18, 14))
    y.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad.sum(), torch.tensor(18.0 * 14.0), rtol=1e-4, atol=0)


def test_matrices_are_cached_and_periodic():
    assert crop_matrix(224, 96).p is crop_matrix(224, 96).p
    assert crop_matrix(224, 96, dtype=torch.float64).p.dtype == torch.float64
    p = crop_matrix(224, 96, "grid", torch.float64).p
    torch.testing.assert_close(p[3:, 7:], p[:-3, :-7], rtol=0, atol=1e-14)
    torch.testing.assert_close(p.sum(1), torch.ones(96, dtype=torch.float64), rtol=0, atol=1e-13)


def photo(height, width):
    """Smooth 8-bit test image with mid-range contrast (no clipping inside PIL)."""
    y, x = np.mgrid[0:height, 0:width]
    image = 128 + 50 * np.sin(x / 5.0) * np.cos(y / 9.0) + 20 * np.sin((x + 2 * y) / 2.5)
    return np.rint(image).astype(np.uint8)


@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
@pytest.mark.parametrize(("shape", "size"), [((224, 224), (96, 96)), ((32, 32), (24, 24)), ((97, 64), (31, 63))])
def test_resample_is_pil_without_rounding(name, shape, size):
    code = Image.Resampling[name.upper()]
    image = photo(*shape)
    y = resample(torch.from_numpy(image)[None, None], size, name)[0, 0].numpy()
    exact = np.asarray(Image.fromarray(image.astype(np.float32)).resize(size[::-1], code))
    assert np.abs(y - exact).max() < 1e-3
    rounded = np.asarray(Image.fromarray(image).resize(size[::-1], code)).astype(np.float32)
    assert np.abs(y - rounded).max() <= 1.01


def test_resample_filters_and_affine():
    for cycles, ratio in ((20, 1.01), (40, 0.78), (56, 0.23), (60, 0.13), (90, 0.03)):
        x = cosine(224, cycles)
        assert rms(resample(x, 96)) / rms(x) == pytest.approx(ratio, abs=0.02)
    x = torch.from_numpy(photo(32, 32))[None, None]
    y = resample(x, 16, "bicubic", mean=(0.4,), std=(0.2,))
    torch.testing.assert_close(y, (resample(x.float(), 16, "bicubic") / 255 - 0.4) / 0.2, rtol=0, atol=1e-5)
    assert torch.equal(resample_matrix(8, 8), torch.eye(8))
    z = noise(1, 1, 8, 8)
    assert resample(z, 8) is z


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: lowfreq_crop(x, 33), "33"),
        (lambda x: lowfreq_crop(x, (16, 40)), "40"),
        (lambda x: lowfreq_crop(x, 0), "0"),
        (lambda x: lowfreq_crop(x, -2), "-2"),
        (lambda x: lowfreq_crop(x[0], 16), "N, C, H, W"),
        (lambda x: lowfreq_crop(x.int(), 16), "int32"),
        (lambda x: lowfreq_crop(x, 16, align="corner"), "corner"),
        (lambda x: lowfreq_crop(x, 16, mean=(0.5,)), "together"),
        (lambda x: lowfreq_crop(x.float(), 16, mean=(0.5,), std=(0.5,)), "uint8"),
        (lambda x: lowfreq_crop(x, 16, mean=(0.5, 0.5), std=(0.5, 0.5)), "3 values"),
        (lambda x: lowfreq_crop(x, 16, mean=(0.5,), std=(0.0,)), "positive"),
        (lambda x: lowfreq_crop(x, 16, out_dtype=torch.uint8), "out_dtype"),
        (lambda x: lowfreq_crop(x, (16, 16, 16)), "height, width"),
        (lambda x: resample(x, 64), "64"),
        (lambda x: resample(x, 16, "box"), "box"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_choice_of_implementation(monkeypatch):
    x = torch.zeros(1, 1, 8, 8)
    monkeypatch.setenv("EFFTRAIN_KERNELS", "reference")
    lowfreq_crop(x, 4)
    monkeypatch.setenv("EFFTRAIN_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="lowfreq_crop cannot run its kernels"):
        lowfreq_crop(x, 4)
    with pytest.raises(ValueError, match="together"):  # what is wrong anyway is said first
        lowfreq_crop(x.byte(), 4, mean=(0.5,))
    monkeypatch.setenv("EFFTRAIN_KERNELS", "cuda")
    with pytest.raises(ValueError, match="cuda"):
        resample(x, 4)


@pytest.mark.parametrize("make", [lowfreq_crop, resample])
def test_flip_flags(make):
    x = noise(3, 2, 32, 24)
    flip = torch.tensor([True, False, True])
    expected = make(torch.stack([x[0].flip(-1), x[1], x[2].flip(-1)]), (16, 12))
    assert torch.equal(make(x, (16, 12), flip=flip), expected)
    assert torch.equal(make(x, (32, 24), flip=flip)[2], x[2].flip(-1))
    with pytest.raises(ValueError, match="flip is bool"):
        make(x, 16, flip=flip[:2])


def test_compiles_in_one_graph():
    def reduce(x, z):
        return lowfreq_crop(x, 16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), resample(z, (12, 17))

    torch._dynamo.reset()
    compiled = torch.compile(reduce, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            x = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).byte()
            z = noise(2, 3, 24, 20).requires_grad_()
            for found, expected in zip(compiled(x, z), reduce(x, z), strict=True):
                torch.testing.assert_close(found, expected)
            (gradient,) = torch.autograd.grad(compiled(x, z)[1].square().sum(), z)
            torch.testing.assert_close(gradient, torch.autograd.grad(reduce(x, z)[1].square().sum(), z)[0])


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("size", [96, 192])
def test_nyquist_term_on_natural_spectra(align, size):
    # Images with a 1/f spectrum, standard deviation 50 around 128: the figure that the README quotes.
    f = torch.fft.fftfreq(224, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt().clamp(min=1 / 224)
    white = torch.randn(8, 1, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.fft.ifft2(torch.fft.fft2(white) / radius).real
    x = 128 + 50 * (x - x.mean((-2, -1), keepdim=True)) / x.std((-2, -1), keepdim=True)
    difference = lowfreq_crop(x, size, align=align) - lowfreq_crop(x, size, align=align, exact=False)
    assert 0.01 < difference.abs().max() < 0.25
