import pytest
import torch

from efftrain_ds.core.errors import ModelError
from efftrain_ds.cost import macs as m

VIT_S = dict(dim=384, depth=12)


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (384, {64: 0.080, 96: 0.176, 128: 0.313, 160: 0.493, 192: 0.721, 224: 1.0}),
        (192, {96: 0.166, 128: 0.298, 160: 0.477, 192: 0.708}),
        (768, {96: 0.182, 128: 0.321, 160: 0.503, 192: 0.728}),
    ],
)
def test_vit_cost_ratios(dim: int, expected: dict[int, float]) -> None:
    full = m.vit_macs(224, dim=dim, depth=12)
    assert {b: round(m.vit_macs(b, dim=dim, depth=12) / full, 3) for b in expected} == expected


def test_vit_small_absolute() -> None:
    n, d = 197, 384
    by_hand = 12 * (12 * n * d * d + 2 * n * n * d) + 196 * 768 * d + 1000 * d
    assert m.vit_macs(224, **VIT_S) == by_hand
    assert round(by_hand / 1e9, 3) == 4.599
    assert m.vit_macs(225, **VIT_S) > by_hand  # padded to a 15 x 15 grid
    assert m.vit_macs(225, **VIT_S) == m.vit_macs(240, **VIT_S)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_small_patch16_224", {}),
        ("vit_base_patch32_224", {"depth": 2}),
        ("deit_tiny_patch16_224", {"drop_path_rate": 0.1, "depth": 2}),
        ("deit3_small_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2, "in_chans": 1}),
        ("vit_tiny_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 2.0, "img_size": 96}),
    ],
)
def test_closed_form_by_name_is_timms_model(name: str, kwargs: dict) -> None:
    shape = m.vit_shape(name, kwargs)
    assert shape is not None
    built = m.build_meta(name, num_classes=10, kwargs={**kwargs, "dynamic_img_size": True})
    assert m.vit_module_shape(built) == shape
    assert m.parameter_count(built) == shape.params(10)
    for side in (96, 160):
        counted = m.counted_macs(built, side, channels=shape.channels)
        assert shape.macs(side, 10) == pytest.approx(counted, rel=0.005)
        assert m.module_macs(built, side) == shape.macs(side, 10)


def test_registered_plain_names_exist_in_timm() -> None:
    import timm

    known = set(timm.list_models())
    names = {f"{family}_{size}_patch{end}" for (family, size), ends in m._PLAIN.items() for end in ends}
    assert names <= known


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet50", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_r26_s32_224", {}),
        ("vit_tiny_patch7_224", {}),
        ("vit_small_patch16_224", {"qkv_bias": False}),
        ("vit_small_patch16_224", {"img_size": [224, 96]}),
    ],
)
def test_no_closed_form(name: str, kwargs: dict) -> None:
    assert m.vit_shape(name, kwargs) is None


def test_image_sets_the_position_grid_not_the_macs() -> None:
    small, full = m.vit_shape("vit_small_patch16_224", image=96), m.vit_shape("vit_small_patch16_224")
    assert small is not None
    assert full is not None
    assert full.params(10) - small.params(10) == (196 - 36) * 384
    assert small.macs(96, 10) == full.macs(96, 10)


def test_other_families_are_counted() -> None:
    at = {side: m.model_macs("resnet18", side, num_classes=1000) for side in (96, 224)}
    assert at[224] / 1e9 == pytest.approx(1.814, abs=0.01)  # He et al. 2016: 1.8 G
    assert at[96] / at[224] == pytest.approx((96 / 224) ** 2, rel=0.02)
    assert m.model_params("resnet18", num_classes=1000) == 11689512


def test_a_vit_with_other_parts_is_counted_not_guessed() -> None:
    built = m.build_meta("vit_tiny_patch16_224", num_classes=0, kwargs={"global_pool": "map", "depth": 2})
    assert m.vit_module_shape(built) is None
    plain = m.vit_macs(224, dim=192, depth=2, num_classes=0)
    assert m.module_macs(built, 224) > plain


def test_counter_sees_attention_and_restores_it() -> None:
    built = m.build_meta("vit_tiny_patch16_224", num_classes=10, kwargs={"depth": 1})
    before = built.blocks[0].attn.fused_attn
    built.train()
    m.counted_macs(built, 224)
    assert built.blocks[0].attn.fused_attn is before
    assert built.training


def test_real_weights_stay_where_they_are() -> None:
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5))
    assert m.module_macs(layer, 4) == 3 * 4 * 4 * 5
    assert layer[1].weight.device.type == "cpu"


def test_errors_name_the_problem() -> None:
    with pytest.raises(ModelError, match='cannot build "no_such_model"'):
        m.model_macs("no_such_model", 224)
    fixed = m.build_meta("vit_tiny_patch16_224", num_classes=10, kwargs={"depth": 1, "qkv_bias": False})
    with pytest.raises(ModelError, match="cannot run at 96 x 96"):
        m.counted_macs(fixed, 96)
