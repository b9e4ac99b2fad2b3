import pytest

from efftrain_ds.cost.macs import build_meta, vit_shape
from efftrain_ds.cost.memory import activation_bytes, module_activation_values, state_memory, vit_activation_bytes

P, W = 1_000_000, 4


@pytest.mark.parametrize(
    ("stage", "expected"),
    [  # bytes a parameter in mixed precision: 2 weight + 2 gradient + 4 master + 8 moments (Rajbhandari et al. 2020)
        (0, 16),
        (1, 2 + 2 + 12 / W),
        (2, 2 + 2 / W + 12 / W),
        (3, 16 / W),
    ],
)
def test_mixed_precision_by_stage(stage: int, expected: float) -> None:
    assert state_memory(P, precision="bf16", zero_stage=stage, world=W).total == expected * P


def test_fp32_ema_and_offload() -> None:
    assert state_memory(P, precision="fp32", zero_stage=0, world=W).total == 16 * P  # no second copy of the weights
    one = state_memory(P, precision="fp32", zero_stage=1, world=W)
    assert (one.parameters, one.gradients, one.master, one.moments) == (4 * P, 4 * P, P, 2 * P)
    assert state_memory(P, precision="fp32", zero_stage=1, world=W, ema=True).total - one.total == P
    assert state_memory(P, precision="bf16", zero_stage=0, world=W, ema=True).ema == 4 * P
    off = state_memory(P, precision="bf16", zero_stage=2, world=W, offload_optimizer=True, activations=7)
    assert (off.master, off.moments, off.activations) == (0, 0, 7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="precision is one of fp32, bf16, fp16"):
        state_memory(P, precision="int8", zero_stage=0, world=1)
    with pytest.raises(ValueError, match="ZeRO stage is 0 to 3"):
        state_memory(P, precision="bf16", zero_stage=4, world=1)


def test_vit_activations_formula() -> None:
    shape = vit_shape("vit_small_patch16_224")
    assert shape is not None
    got = vit_activation_bytes(shape, 224, micro_batch=2, precision="bf16")
    assert got == 2 * (34 * 197 * 384 * 12 + 2 * 3 * 224**2)
    assert vit_activation_bytes(shape, 224, micro_batch=2, precision="fp32") == 2 * got
    assert vit_activation_bytes(shape, 224, micro_batch=4, precision="bf16") == 2 * got


def test_formula_and_leaf_outputs_agree_on_a_vit() -> None:
    shape = vit_shape("vit_tiny_patch16_224")
    assert shape is not None
    built = build_meta("vit_tiny_patch16_224", num_classes=10)
    formula = vit_activation_bytes(shape, 224, micro_batch=1, precision="bf16") / 2
    assert module_activation_values(built, 224) == pytest.approx(formula, rel=0.2)


def test_conv_activations_follow_the_area() -> None:
    big, small = (
        activation_bytes("resnet18", side, micro_batch=8, precision="fp32", num_classes=10) for side in (224, 96)
    )
    assert small / big == pytest.approx((96 / 224) ** 2, rel=0.03)
