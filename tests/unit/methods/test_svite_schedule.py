import pytest

from efftrain_ds.core.errors import ConfigError
from efftrain_ds.methods.svite.densities import exact_counts, layer_densities
from efftrain_ds.methods.svite.schedule import (
    DensitySchedule,
    UpdateSchedule,
    end_step,
    ramp_densities,
    ramp_edges,
    scaled_interval,
)


def schedule(**changes):
    return UpdateSchedule(**({"total": 1000, "every": 100, "end": end_step(1000, 0.8)} | changes))


def test_update_steps():
    s = schedule()
    assert list(s.steps) == [100, 200, 300, 400, 500, 600, 700]
    assert [t for t in range(1000) if s.is_update(t)] == list(s.steps)
    assert len(schedule(end=801).steps) == 8
    assert list(schedule(end=0).steps) == []


@pytest.mark.parametrize(
    ("total", "every", "updates"), [(1_501_200, 20_000, 60), (1_501_200, 15_000, 80), (750_600, 7_000, 85)]
)
def test_updates_of_the_published_runs(total, every, updates):
    assert len(UpdateSchedule(total, every, end_step(total, 0.8)).steps) == updates
    # a run of 300 epochs with the scaled interval has as many
    half = scaled_interval(every, total, total // 2)
    assert len(UpdateSchedule(total // 2, half, end_step(total // 2, 0.8)).steps) == updates


def test_end_step_takes_the_decimal():
    assert end_step(1000, 0.8) == 800
    assert end_step(10, 0.7) == 7  # 0.7 * 10 in floats is just below 7
    assert end_step(3, 0.8) == 3  # 2.4: step 2 still lies before it
    for share in (0, -1, 1.1):
        with pytest.raises(ConfigError, match="end share"):
            end_step(10, share)


def test_fractions():
    paper, reference, constant = (schedule(alpha=a) for a in ("paper", "reference", "constant"))
    assert paper.fraction(0) == reference.fraction(0) == constant.fraction(0) == 0.5
    assert paper.fraction(400) == pytest.approx(0.25)
    assert paper.fraction(700) == pytest.approx(0.0190301, abs=1e-7)
    assert paper.fraction(800) == paper.fraction(1000) == 0
    assert reference.fraction(800) == pytest.approx(0.0523, abs=5e-5)
    assert reference.fraction(1000) == pytest.approx(0.005)
    assert constant.fraction(799) == 0.5
    values = [paper.fraction(t) for t in range(801)]
    assert values == sorted(values, reverse=True)


def test_postponed_updates():
    s = schedule()
    last, done = 0, []
    refused = {100, 101, 400, 699, 700}
    for step in range(1000):
        if s.due(step, last) and step not in refused:
            last = step
            done.append(step)
    assert done == [102, 200, 300, 401, 500, 600, 701]
    assert not s.due(800, 600)  # too late


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"alpha": "linear"}, "allowed: paper, reference, constant"),
        ({"every": 0}, "every 0 steps"),
        ({"end": 1001}, "do not fit 1000 steps"),
        ({"initial": 1.5}, "update fraction is 1.5"),
    ],
)
def test_schedule_errors(changes, text):
    with pytest.raises(ConfigError, match=text):
        schedule(**changes)


def test_density_schedules():
    cubic = DensitySchedule(0.5, 0.2, 100, 500)
    assert cubic.at(0) == cubic.at(100) == 0.5
    assert cubic.at(300) == pytest.approx(0.2 + 0.3 * 0.125)
    assert cubic.at(500) == cubic.at(900) == 0.2
    constant = DensitySchedule(0.3, 0.3)
    assert {constant.at(t) for t in range(5)} == {0.3}
    for wrong in ((0.5, 0.0), (1.5, 0.5), (0.5, 0.2, 10, 10)):
        with pytest.raises(ConfigError):
            DensitySchedule(*wrong)


@pytest.mark.parametrize("rule", ["erk", "er", "uniform"])
def test_falling_density_never_makes_a_layer_grow(rule):
    shapes = {"patch": (64, 3, 8, 8), "qkv": (192, 64), "proj": (64, 64), "head": (10, 64)}
    course = DensitySchedule(1.0, 0.1, 0, 100)
    counts = [exact_counts(shapes, layer_densities(shapes, course.at(t), rule)) for t in range(0, 101, 5)]
    for name in shapes:
        values = [c[name] for c in counts]
        assert values == sorted(values, reverse=True)


def test_ramps():
    assert ramp_densities(1.0, 0.4, 4) == (1.0, 0.8, 0.6, 0.4)
    assert ramp_densities(0.7, 0.7, 2) == (0.7, 0.7)
    assert ramp_edges(0.6, 4) == pytest.approx((0.0, 0.2, 0.4, 0.6))
