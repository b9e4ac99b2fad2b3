import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from efftrain_ds.core.errors import PlanError
from efftrain_ds.cost.macs import vit_macs
from efftrain_ds.methods.autoprog.candidates import candidates, draw, unfreezing_candidates
from efftrain_ds.methods.autoprog.config import AutoProgConfig, AutoProgZeroConfig
from efftrain_ds.methods.autoprog.levels import step_cost, trained_blocks
from efftrain_ds.methods.autoprog.schedules import (
    levels,
    magnitudes,
    make_divisible,
    ramp,
    rates,
    resolution_step,
    stage_epochs,
)

# Ramps


@pytest.mark.parametrize(
    ("start", "full", "round_to", "expected"),
    [
        (0.5, 224, 32, (128, 160, 192, 224)),
        (0.4, 224, 32, (96, 128, 192, 224)),
        (0.25, 256, 32, (64, 128, 192, 256)),
        (0.5, 12, 1, (6, 8, 10, 12)),
        (0.4, 12, 1, (5, 7, 10, 12)),
        (0.5, 18, 1, (9, 12, 15, 18)),
        (0.4, 18, 1, (7, 11, 14, 18)),
        (0.5, 24, 1, (12, 16, 20, 24)),
        (0.4, 24, 1, (10, 14, 19, 24)),
        (0.5, 96, 16, (48, 64, 80, 96)),
        (0.5, 6, 1, (3, 4, 5, 6)),
        (0.5, 4, 1, (2, 3, 3, 4)),
        (0.5, 288, 32, (160, 192, 224, 288)),  # 5/6 of 288 is 240 less one float error: down, as in the authors' code
        (None, 12, 1, (12, 12, 12, 12)),
        (1.0, 12, 1, (12, 12, 12, 12)),
    ],
)
def test_levels_of_the_reference(start, full, round_to, expected):
    assert levels(start, full, round_to, 4) == expected


def test_levels_never_fall_and_end_full():
    for start in (0.05, 0.3, 0.5, 0.77, 1.0):
        for full, round_to in ((224, 32), (230, 32), (28, 8), (11, 1), (3, 1)):
            for stages in (1, 2, 3, 7):
                values = levels(start, full, round_to, stages)
                assert len(values) == stages
                assert values[-1] == full
                assert all(0 < a <= b for a, b in pairwise((*values, full)))


def test_make_divisible():
    assert [make_divisible(*case) for case in ((149.33, 32), (2.76, 2), (2.07, 2), (16, 32))] == [160, 4, 2, 32]
    # depths of VOLO's first stage for 9, 12, 15, 18 blocks
    assert [make_divisible(0.23 * blocks, 2) for blocks in (9, 12, 15, 18)] == [2, 4, 4, 4]


def test_regularisation_ramps():
    assert ramp(0.5, 1) == (1.0,)
    assert magnitudes(0.5, 9, 4) == (4, 6, 7, 9)
    assert magnitudes(0.0, 9, 4) == (0, 3, 6, 9)
    assert magnitudes(-0.5, 9, 4) == (0, 0, 4, 9)
    assert magnitudes(0.5, 7.5, 2) == (4, 7.5)  # the last stage has the user's value, whole or not
    assert magnitudes(0.9, 0.5, 2) == (0, 0.5)
    assert rates(0.0, 0.1, 4) == pytest.approx((0, 0.1 / 3, 0.2 / 3, 0.1), abs=1e-12)
    assert rates(-0.5, 0.1, 4) == pytest.approx((0, 0, 0.05, 0.1), abs=1e-12)
    assert rates(0.0, 0.25, 4) == pytest.approx((0, 0.25 / 3, 0.5 / 3, 0.25), abs=1e-12)
    assert rates(-0.5, 0.25, 4) == pytest.approx((0, 0, 0.125, 0.25), abs=1e-12)


def test_stage_starts():
    assert stage_epochs(100, 4) == (0, 25, 50, 75)
    assert stage_epochs(300.0, 4) == (0, 75, 150, 225)
    assert stage_epochs(10, 4) == (0, 2, 5, 7)  # floors
    assert stage_epochs(10, 3) == (0, 3, 6)
    assert stage_epochs(2.6, 2) == (0, Fraction(13, 10))  # exact as written
    assert stage_epochs(4.5, 4) == (0, Fraction(9, 8), Fraction(9, 4), Fraction(27, 8))
    for epochs in (3, 3.5):
        with pytest.raises(PlanError, match=r"4 stages.*efftrain\.run\.epochs.*3"):
            stage_epochs(epochs, 4)


def test_resolution_step():
    assert resolution_step(224, 16) == 32
    assert resolution_step(224, 32) == 32
    assert resolution_step(28, 4) == 4  # the image is not a multiple of 32
    assert resolution_step(224, 14) == 14  # 32 is not a multiple of the stride
    assert resolution_step(224, 16, 16) == 16
    assert levels(0.5, 28, resolution_step(28, 4), 4) == (16, 20, 24, 28)
    for bad in (24, 0, 256):
        with pytest.raises(PlanError, match=rf"efftrain\.methods\.autoprog\.resolution_step.*stride 16.*found {bad}"):
            resolution_step(224, 16, bad)
    with pytest.raises(PlanError, match=r"efftrain\.methods\.autoprog_zero\.resolution_step"):
        resolution_step(224, 16, 8, key="efftrain.methods.autoprog_zero.resolution_step")


def test_ramp_saves_what_the_closed_form_says():
    depths, sides = levels(0.5, 12, 1, 4), levels(0.5, 224, 32, 4)
    costs = [vit_macs(r, dim=384, depth=d) for d, r in zip(depths, sides, strict=True)]
    assert sum(costs) / len(costs) / vit_macs(224, dim=384, depth=12) == pytest.approx(0.523, abs=0.002)


# Candidates

DEPTHS, SIDES = (6, 8, 10, 12), (128, 160, 192, 224)


def product(sides, depths):
    return tuple((d, r) for r in sides for d in depths)


def test_first_search_spans_the_space():
    grid = product((128, 192, 224), (6, 10, 12))
    assert candidates(None, DEPTHS, SIDES) == grid
    assert candidates(None, DEPTHS, SIDES, force_depth_growth=True) == grid
    assert candidates(None, (4, 3, 3, 2), [28]) == product([28], (2, 3, 4))  # duplicates and order do not matter
    assert candidates(None, [12], [224]) == ((12, 224),)


def test_later_searches():
    assert candidates((6, 128), DEPTHS, SIDES, force_depth_growth=True) == product((128, 160), (8, 10, 12))
    assert candidates((10, 224), DEPTHS, SIDES, force_depth_growth=True) == ((12, 224),)
    assert candidates((12, 128), DEPTHS, SIDES, force_depth_growth=True) == product((128, 160), [12])
    assert candidates((6, 128), DEPTHS, SIDES) == product((128, 160), (6, 8, 10))
    assert candidates((10, 224), DEPTHS, SIDES) == product([224], (10, 12))
    assert candidates((12, 224), DEPTHS, SIDES) == ((12, 224),)


@pytest.mark.parametrize("force", [False, True])
def test_a_run_never_shrinks_and_ends_full(force):
    for seed in range(20):
        rng, psi = random.Random(seed), None
        for _ in range(3):  # the last stage is the full model, without a search
            found = candidates(psi, DEPTHS, SIDES, force)
            if psi is not None:
                assert all(d >= psi[0] and r >= psi[1] for d, r in found)
                assert force or psi in found
                assert not force or psi[0] == 12 or all(d > psi[0] for d, _ in found)
            psi = rng.choice(found)
        while psi != (12, 224):  # the largest candidate always leads on to the full model
            bigger = candidates(psi, DEPTHS, SIDES, force)[-1]
            assert bigger > psi
            assert bigger[1] >= psi[1]
            psi = bigger


def test_unfreezing_candidates():
    sides = (64, 128, 192, 256)
    assert unfreezing_candidates(None, range(1, 5), sides) == ((1, 64), (2, 64), (1, 128), (2, 128))
    assert unfreezing_candidates((2, 64), range(1, 5), sides) == ((2, 64), (3, 64), (2, 128), (3, 128))
    assert unfreezing_candidates((4, 256), range(1, 5), sides) == ((4, 256),)


# Draws


def test_draws_are_uniform_and_independent():
    grid = candidates(None, DEPTHS, SIDES)
    counts = Counter(draw(grid, 7, step) for step in range(9000))
    assert set(counts) == set(grid)
    assert all(850 < n < 1150 for n in counts.values())
    # neighbours in time are independent too: a lattice would leave pairs of cells out
    pairs = Counter((draw(grid, 7, step), draw(grid, 7, step + 1)) for step in range(9000))
    assert len(pairs) == 81
    assert draw([(12, 224)], 7, 3) == (12, 224)
    assert [draw(grid, 8, s) for s in range(30)] != [draw(grid, 7, s) for s in range(30)]


def test_draws_leave_the_global_generators_alone():
    grid, sequences = candidates(None, DEPTHS, SIDES), []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        sequences.append([draw(grid, 7, step) for step in range(50)])
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == expected
    assert sequences[0] == sequences[1]


def test_draws_are_equal_in_another_process():
    code = (
        "from efftrain_ds.methods.autoprog.candidates import candidates, draw\n"
        f"grid = candidates(None, {DEPTHS}, {SIDES})\n"
        "print([draw(grid, 7, step) for step in range(40)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    grid = candidates(None, DEPTHS, SIDES)
    assert done.stdout.strip() == str([draw(grid, 7, step) for step in range(40)])


# Unfreezing levels


def test_interleaved_levels_are_exact():
    assert trained_blocks(12, 1, 4) == {0, 4, 8}
    assert trained_blocks(12, 2, 4) == {0, 4, 8, 1, 5, 9}
    assert trained_blocks(12, 4, 4) == set(range(12))
    # 28 blocks: 14 at level 2 and 21 at level 3, where matching names by prefix gives 20 and 26
    assert [len(trained_blocks(28, u, 4)) for u in (1, 2, 3, 4)] == [7, 14, 21, 28]


def test_suffix_levels():
    assert trained_blocks(12, 1, 4, "suffix") == {9, 10, 11}
    assert trained_blocks(6, 1, 4, "suffix") == {4, 5}  # ceil(1.5)
    assert trained_blocks(2, 1, 4, "suffix") == {1}
    assert trained_blocks(7, 4, 4, "suffix") == set(range(7))
    for order in ("interleaved", "suffix"):
        sets = [trained_blocks(10, u, 4, order) for u in (1, 2, 3, 4)]
        assert all(a < b for a, b in pairwise(sets))
    for level in (0, 5):
        with pytest.raises(ValueError, match=rf"1\.\.4, found {level}"):
            trained_blocks(12, level, 4)
    assert step_cost(0.25) == 0.75
    assert step_cost(1.0) == 1.0


# Configuration


def test_config_defaults_and_manual_schedule():
    config = AutoProgConfig()
    assert (config.stages, config.depth_start, config.resolution_start, config.search) == (4, 0.5, 0.5, None)
    assert AutoProgConfig(**AutoProgConfig(search={}).model_dump()).search.epochs == 2.0
    manual = AutoProgConfig(
        schedule=[{"until": 0.5, "depth": 2, "resolution": 16, "magnitude": 3}, {"until": 1.0, "depth": 4}]
    )
    assert manual.schedule[1].resolution is None
    assert AutoProgConfig(**manual.model_dump()) == manual  # a resolved configuration can be read again
    zero = AutoProgZeroConfig(search={"samples": 8})
    assert (zero.stages, zero.resolution_start, zero.order, zero.search.samples) == (4, 0.25, "interleaved", 8)


FULL = {"until": 1.0, "depth": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": [FULL], "search": {}}, '"search" or "schedule", not both'),
        ({"stages": 1, "search": {}}, "at least 2 stages"),
        ({"search": {}, "depth_start": None, "resolution_start": 1.0}, "nothing to choose"),
        ({"schedule": []}, "end at 1.0, found \\[\\]"),
        ({"schedule": [{"until": 0.5, "depth": 4}]}, "end at 1.0, found \\[0.5\\]"),
        ({"schedule": [{"until": 0.5, "depth": 5}, FULL]}, "must not fall, found \\[5, 4\\]"),
        (
            {"schedule": [{"until": 0.5, "depth": 4, "resolution": 224}, {**FULL, "resolution": 192}]},
            "must not fall, found \\[224, 192\\]",
        ),
        ({"schedule": [FULL], "stages": 3}, '"stages" belongs to the ramps'),
        ({"schedule": [FULL], "erasing_start": None}, '"erasing_start" belongs to the ramps'),
        ({"stages": 0}, "greater than or equal to 1"),
        ({"depth_start": 0.0}, "greater than 0"),
        ({"operator": "clone"}, "mogrow"),
        ({"stage": 3}, "Extra inputs"),
    ],
)
def test_config_refusals(config, message):
    with pytest.raises(ValidationError, match=message):
        AutoProgConfig(**config)


def test_zero_config_refusals():
    with pytest.raises(ValidationError, match="at least 2 stages"):
        AutoProgZeroConfig(stages=1, search={})
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        AutoProgZeroConfig(search={"zico_batches": 1})
