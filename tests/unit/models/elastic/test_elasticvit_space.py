"""ElasticViT's space: counts, prices, released sub-networks, draws and written forms."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from efftrain_ds.core.errors import ConfigError, ModelError
from efftrain_ds.core.rng import numpy_rng
from efftrain_ds.models.elastic import elasticvit_space, read_space, released_subnets
from efftrain_ds.models.elastic.hybrid_space import StageSpec
from efftrain_ds.models.elastic.named import space_of

SPACE = elasticvit_space()
TINY = elasticvit_space(divisor=4, num_classes=10, resolutions=(32, 40, 44, 48), head_width=32)

RELEASED = {  # name: MACs by the published count and exactly, parameters without position tables, all in millions
    "T1": (62.92, 64.90, 8.90),
    "T2": (119.98, 120.55, 9.29),
    "S1": (217.64, 221.55, 10.82),
    "S2": (318.53, 320.25, 10.21),
    "M": (415.58, 417.42, 12.00),
    "L1": (517.11, 522.88, 12.74),
    "L1.5": (618.78, 626.03, 14.68),
    "L2": (704.11, 713.13, 14.87),
    "L3": (815.40, 824.59, 15.31),
}

SMALLEST = {
    1: SPACE.make(128, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1)),
    2: SPACE.make(176, (16, 24, 32, 48, 96, 176, 224), (1, 3, 3, 2, 2, 2, 2), mlp=(2, 3, 2, 2)),
    3: SPACE.make(224, (16, 24, 32, 64, 96, 192, 256), (1, 3, 3, 2, 2, 2, 2)),
}
"""The smallest sub-networks of the three groups of complexity levels."""


def test_count():
    assert SPACE.count() == 6 * 2 * 31502 * 43200 * 8**2 * 12**4 == 21672453419827200
    small = dataclasses.replace(
        TINY,
        resolutions=(32, 48),
        stages=(
            StageSpec("stem", 1, (4, 6), (1, 2), (1,), (3,)),
            StageSpec("conv", 2, (4, 6, 8), (1,), (3, 4), (3,)),
            StageSpec("vit", 2, (4, 8, 12), (1, 3), mlp=(2,), v_scale=(2, 3)),
        ),
    )
    rows = np.array(list(itertools.product(*[range(len(d.choices)) for d in small.dimensions])), np.int8)
    legal = rows[small.legal(rows)]
    assert small.count() == len(legal) < len(rows)
    lower = small.config(legal[len(legal) // 3])
    assert small.count(lower) == small.at_least(legal, lower).sum() > 0
    assert len({small.config(row) for row in legal}) == len(legal)
    assert all(small.contains(small.config(row)) for row in legal)
    # draws reach all of them; widths are uniform among the paths that do not decrease
    drawn = small.sample_codes(np.random.default_rng(0), 40_000)
    assert small.legal(drawn).all()
    found, times = np.unique(drawn[:, list(small.ascending)], axis=0, return_counts=True)
    assert len(found) == len(np.unique(legal[:, list(small.ascending)], axis=0))
    assert abs(times / 40_000 * len(found) - 1).max() < 0.1
    assert len(np.unique(drawn, axis=0)) == len(legal)


def test_extremes():
    assert SPACE.macs(SPACE.min(), "reference") == 37_365_024
    assert SPACE.macs(SPACE.max(), "reference") == 3_191_458_816
    assert SPACE.macs(SPACE.min()) == 38_286_208
    assert SPACE.macs(SPACE.max()) == 3_213_102_592
    assert SPACE.min() == SMALLEST[1]
    assert SPACE.max().widths == (24, 32, 48, 96, 160, 288, 320)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sub_networks(name):
    config = released_subnets()[name]
    reference, exact, params = RELEASED[name]
    assert SPACE.contains(config)
    assert SPACE.macs(config, "reference") / 1e6 == pytest.approx(reference, abs=0.01)
    assert SPACE.macs(config) / 1e6 == pytest.approx(exact, abs=0.01)
    assert SPACE.params(config, position=False) / 1e6 == pytest.approx(params, abs=0.005)
    # wide and shallow
    assert max(config.depths[3:]) <= 2


def test_smallest_of_the_levels():
    wanted = {1: (37.37, 38.29), 2: (159.92, 161.67), 3: (288.81, 290.31)}
    for key, config in SMALLEST.items():
        assert SPACE.macs(config, "reference") / 1e6 == pytest.approx(wanted[key][0], abs=0.01)
        assert SPACE.macs(config) / 1e6 == pytest.approx(wanted[key][1], abs=0.01)


def test_ten_thousand_draws_are_legal():
    codes = SPACE.sample_codes(np.random.default_rng(0), 10_000)
    assert SPACE.legal(codes).all()
    numbers = dict(zip([d.name for d in SPACE.dimensions], SPACE.numbers(codes), strict=True))
    widths = np.stack([numbers[f"{stage.name}.width"] for stage in SPACE.stages])
    assert (np.diff(widths, axis=0) >= 0).all()
    assert (widths[3:] % 16 == 0).all()
    for dimension in SPACE.dimensions:
        assert set(numbers[dimension.name]) == set(dimension.choices)
    ratio = SPACE.macs_of(codes, "reference") / SPACE.macs_of(codes)
    assert 0.96 < ratio.min() < 0.98
    assert 1 < ratio.max() < 1.01
    for row in codes[:200]:
        config = SPACE.config(row)
        assert (SPACE.codes(config) == row).all()
        assert SPACE.from_reference(SPACE.to_reference(config)) == config
        assert SPACE.parse(json.loads(json.dumps(config.to_dict()))) == config
    # heads of layers follow the width
    assert SPACE.to_reference(released_subnets()["T1"])[6] == [4, 6, 11, 17]


@pytest.mark.parametrize("key", [1, 2, 3])
def test_draws_from_a_lower_bound(key):
    codes = SPACE.sample_codes(np.random.default_rng(1), 2_000, SMALLEST[key])
    assert SPACE.legal(codes).all()
    assert SPACE.at_least(codes, SMALLEST[key]).all()
    assert SPACE.contains(SPACE.config(codes[0]), SMALLEST[key])
    bigger = [SPACE.count(SMALLEST[k]) for k in (1, 2, 3)]
    assert bigger[0] == SPACE.count()
    assert sorted(bigger, reverse=True) == bigger


def test_draws_depend_on_the_generator_only():
    one = SPACE.sample(numpy_rng(3, "subnet", 17))
    np.random.seed(0)
    assert SPACE.sample(numpy_rng(3, "subnet", 17)) == one
    assert elasticvit_space().sample(numpy_rng(3, "subnet", 17)) == one
    assert SPACE.sample(numpy_rng(3, "subnet", 18)) != one


@pytest.mark.parametrize(("anchor", "name", "delta"), [
    (1, "S1", -6.82), (1, "M", -10.38), (1, "L3", -121.56), (2, "S1", -26.84), (2, "M", -50.06), (2, "L3", -252.15),
])  # fmt: skip
def test_groups_of_the_preference_for_wide_and_shallow(anchor, name, delta):
    row = SPACE.codes(released_subnets()[name])[None]
    swapped = [SPACE.macs_of(SPACE.with_group(row, group, SMALLEST[anchor])) for group in ("widths", "depths")]
    assert (swapped[0] - swapped[1])[0] / 1e6 == pytest.approx(delta, abs=0.01)
    names = {group: [SPACE.dimensions[c].name for c in columns] for group, columns in SPACE.groups.items()}
    assert names["widths"] == ["vit1.width", "vit2.width", "vit3.width", "vit4.width"]
    assert names["depths"] == ["vit1.depth", "vit2.depth", "vit3.depth", "vit4.depth"]
    with pytest.raises(ModelError, match='no group "heads"'):
        SPACE.with_group(row, "heads", SMALLEST[anchor])


def test_reference_formula_by_hand():
    """The points in which the published count differs, for one stage that is easy to follow."""
    config = SPACE.make(176, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1))
    v, side, widths = 2, (11, 11, 6, 3), (48, 80, 144, 160)
    inputs, strides, befores = (16, 48, 80, 144), (2, 1, 2, 2), (22, 11, 11, 6)
    difference = 0
    for h, c, i, s, before in zip(side, widths, inputs, strides, befores, strict=True):
        n = 6 * i
        difference += h * h * v * c * (1 - 9) + h**4 * (c // 16)
        difference -= 2 * n * (n // 4) + i * c * h * h
        difference += i * n * ((s * h) ** 2 - before**2)
    difference += 16 * 16 * 44**2 + 16 * 16 * 22**2  # shortcuts of both convolution stages, 16 to 16 channels
    assert SPACE.macs(config, "reference") - SPACE.macs(config) == difference
    with pytest.raises(ModelError, match="allowed: exact, reference"):
        SPACE.macs(config, "flops")


def test_hash_and_json_of_the_space():
    again = read_space(json.loads(json.dumps(SPACE.to_dict())))
    assert again == SPACE
    assert again.hash == SPACE.hash
    assert len({SPACE.hash, TINY.hash, elasticvit_space(num_classes=10).hash}) == 3
    with pytest.raises(ConfigError, match='space.space is "resnet"; allowed: elasticvit, plain_vit'):
        read_space({"space": "resnet"})
    broken = SPACE.to_dict() | {"resolution": [224]}
    with pytest.raises(ConfigError, match='unknown entry "resolution".*Did you mean "resolutions"'):
        read_space(broken)
    broken = SPACE.to_dict()
    broken["stages"][3]["widths"] = [50]
    with pytest.raises(ConfigError, match="width 50 is no multiple of the head size 16"):
        read_space(broken)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("head_dim", 0, r"space.head_dim is 0; a positive integer is needed"),
    ("head_width", "128", r'space.head_width is "128"; a positive integer is needed'),
    ("in_chans", True, r"space.in_chans is true; a positive integer"),
    ("resolutions", [0], r"space.resolutions is \[0\]; a list of positive integers is needed"),
    ("resolutions", 224, r"space.resolutions is 224; a list of positive integers is needed"),
    ("resolutions", ["a"], r'space.resolutions is \["a"\]; a list'),
    ("resolutions", [], r"resolution: choices \[\]; allowed: 1 to 127 different values"),
    ("stages", None, r"space.stages is null; a list of objects is needed"),
    ("stages", [1, 2], r"space.stages\[0\] is 1; an object is needed"),
    ("kernels", 3, r"space.stages\[1\].kernels is 3; a list of positive integers is needed"),
    ("depths", [0, 1], r"space.stages\[1\].depths is \[0, 1\]; a list of positive integers is needed"),
    ("widths", [-8, 16], r"space.stages\[1\].widths is \[-8, 16\]; a list of positive"),
    ("widths", [12.5], r"space.stages\[1\].widths is \[12.5\]; a list of positive"),
    ("widths", [24, 16], r"conv1.width: choices \[24, 16\]; allowed: .* ascending"),
    ("stride", "2", r'space.stages\[1\].stride is "2"; a positive integer'),
    ("se", 1, r"space.stages\[1\].se is 1; true or false is needed"),
    ("name", 3, r"space.stages\[1\].name is 3; a text is needed"),
])  # fmt: skip
def test_errors_in_a_space(key, value, message):
    data = json.loads(json.dumps(SPACE.to_dict()))
    (data if key in data else data["stages"][1])[key] = value
    with pytest.raises(ConfigError, match=message):
        read_space(data)


@pytest.mark.parametrize(("name", "kwargs", "message"), [
    ("elasticvit", {"divisor": 0}, "kwargs: divisor is 0; a positive integer"),
    ("elasticvit", {"divisor": "4"}, 'kwargs: divisor is "4"; a positive integer'),
    ("elasticvit", {"resolutions": 224}, "kwargs: resolutions is 224; a list of positive integers"),
    ("elasticvit", {"space": [1]}, r"kwargs.space is \[1\]; an object is needed"),
    ("elasticvit", {"space": {"space": ["plain_vit"]}}, r'kwargs.space.space is \["plain_vit"\]; allowed'),
    ("elastic_autoformer_tiny", {"patch": 0}, "kwargs: patch is 0; a positive integer"),
    ("elastic_autoformer_tiny", {"head_dim": 0}, "kwargs: head_dim is 0"),
])  # fmt: skip
def test_errors_in_arguments_of_a_model(name, kwargs, message):
    with pytest.raises(ModelError, match=f"efftrain.model.{message}"):
        space_of(name, kwargs, 10)


def edit(config, path, value):
    data = json.loads(json.dumps(config.to_dict()))
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "message"), [
    (("stages", "vit5"), {"width": 48}, 'subnet.stages: unknown entry "vit5".*Did you mean "vit'),
    (("stages", "vit2"), None, 'subnet.stages: "vit2" is missing'),
    (("stages", "vit1", "kernel"), 3, 'subnet.stages.vit1: unknown entry "kernel"'),
    (("stages", "conv1", "expand"), None, 'subnet.stages.conv1: "expand" is missing'),
    (("stages", "vit1", "width"), 50, "vit1.width is 50; allowed: 48, 64, 80, 96"),
    (("stages", "vit1", "width"), 64.0, "subnet.stages.vit1.width is 64.0; an integer is needed"),
    (("stages", "vit1", "depth"), True, "subnet.stages.vit1.depth is true; an integer"),
    (("stages", "conv2", "width"), 16, "conv2.width is 16, less than conv1.width with 24"),
    (("resolution",), 200, "resolution is 200; allowed: 128, 160, 176"),
    (("stages",), [1], "subnet.stages is .1.; an object is needed"),
    (("resolutions",), 224, 'unknown entry "resolutions"'),
])  # fmt: skip
def test_errors_in_a_configuration(path, value, message):
    with pytest.raises(ConfigError, match=message):
        SPACE.parse(edit(released_subnets()["T1"], path, value))


def test_errors_of_lists():
    assert not SPACE.contains("T1")
    assert not SPACE.contains(TINY.min())
    with pytest.raises(ModelError, match="3 values for 4 stages"):
        SPACE.make(128, (16, 16, 16, 48, 80, 144, 160), (1, 2, 2, 1, 1, 1, 1), mlp=(2, 2, 2))
    good = list(SPACE.to_reference(released_subnets()["S1"]))
    with pytest.raises(ModelError, match=r"vit1: mlp \[2, 3\]"):
        SPACE.from_reference([*good[:5], [2, 3, 2, 2, 3, 3, 4, 4], *good[6:]])
    with pytest.raises(ModelError, match="vit1: the heads do not fit"):
        SPACE.from_reference([*good[:6], [5, 5, 6, 6, 12, 12, 17, 17], *good[7:]])
    with pytest.raises(ModelError, match="windows"):
        SPACE.from_reference([*good[:7], 7, 1, good[9]])
    with pytest.raises(ModelError, match="has 10"):
        SPACE.from_reference(good[:9])
    with pytest.raises(ModelError, match="cannot be divided by 3"):
        elasticvit_space(divisor=3)


def test_a_million_rows_are_priced_in_one_call():
    """Draws and prices of whole tables are array operations: no Python loop over sub-networks."""
    codes = SPACE.sample_codes(np.random.default_rng(0), 100_000)
    macs = SPACE.macs_of(codes)
    assert macs.dtype == np.int64
    assert codes.dtype == np.int8
    for row in (0, 77_777):
        assert SPACE.macs(SPACE.config(codes[row])) == macs[row]
