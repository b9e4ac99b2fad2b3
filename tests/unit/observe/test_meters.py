import json

import pytest

from efftrain_ds.observe.meters import Chrono, StepMeter, seconds_left


class FakeClock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


def one_step(meter: StepMeter, clock: FakeClock, *, stage: int, data: float, compute: float, images: int = 10) -> float:
    meter.begin()
    with meter.part("data"):
        clock.tick(data)
    with meter.part("compute"):
        clock.tick(compute)
    return meter.end(stage, images)


def test_chrono_charges_one_activity_at_a_time() -> None:
    clock = FakeClock()
    chrono = Chrono(clock)
    chrono.switch("train")
    clock.tick(10)
    with chrono.during("eval"):
        clock.tick(3)
        with chrono.during("checkpoint"):
            clock.tick(2)
        clock.tick(1)
    clock.tick(5)
    assert chrono.seconds == {"train": 15.0, "eval": 4.0, "checkpoint": 2.0}
    clock.tick(1)
    assert chrono.seconds["train"] == 16.0


def test_chrono_goes_on_after_an_error_and_a_resume() -> None:
    clock = FakeClock()
    chrono = Chrono(clock)
    chrono.switch("train")
    clock.tick(4)

    def fail() -> None:
        with chrono.during("eval"):
            clock.tick(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    state = json.loads(json.dumps(chrono.state_dict()))
    again = Chrono(clock)
    again.switch("train")
    clock.tick(50)  # start-up before the state was read
    again.load_state_dict(state)
    clock.tick(2)
    assert again.seconds == {"train": 6.0, "eval": 1.0}


def test_rates_over_the_window() -> None:
    clock = FakeClock()
    meter = StepMeter(window=2, clock=clock)
    assert meter.rates() is None
    one_step(meter, clock, stage=0, data=9.0, compute=9.0)  # falls out of the window
    assert one_step(meter, clock, stage=0, data=0.5, compute=1.5) == pytest.approx(2.0)
    one_step(meter, clock, stage=0, data=0.5, compute=2.5, images=30)
    rates = meter.rates()
    assert rates is not None
    assert rates.steps == 2
    assert rates.step_seconds == pytest.approx(2.5)
    assert rates.images_per_s == pytest.approx(40 / 5)
    assert rates.shares == pytest.approx({"data": 0.2, "compute": 0.8})


def test_time_outside_and_between_steps_is_left_out() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    meter.begin()
    clock.tick(1)
    with meter.outside():
        clock.tick(100)
    clock.tick(1)
    assert meter.end(0, 1) == pytest.approx(2.0)
    clock.tick(50)
    assert one_step(meter, clock, stage=0, data=0, compute=3) == pytest.approx(3.0)
    assert meter.stage_seconds == pytest.approx({0: 5.0})


def test_a_new_stage_starts_a_new_window() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    for _ in range(3):
        one_step(meter, clock, stage=0, data=0, compute=1)
    one_step(meter, clock, stage=1, data=0, compute=7)
    rates = meter.rates()
    assert rates is not None
    assert rates.step_seconds == pytest.approx(7.0)
    assert meter.stage_steps == {0: 3, 1: 1}


def test_median_and_resume() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    for seconds in (60.0, 1.0, 2.0, 3.0, 2.0):  # the first step of a stage is slow
        one_step(meter, clock, stage=0, data=0, compute=seconds)
    assert meter.stage_median(0) == (2.0, 5)
    assert meter.stage_median(1) is None
    again = StepMeter(clock=clock)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert again.rates() is None
    one_step(again, clock, stage=0, data=0, compute=4.0)
    assert again.stage_seconds == pytest.approx({0: 72.0})
    assert again.stage_steps == {0: 6}
    assert again.stage_median(0) == (2.5, 6)


def test_end_without_begin_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        StepMeter().end(0, 1)


# Three stages of cost 20, 40, 40 in 100, 50, 20 steps; the last does the same work a step as the first would not.
COSTS, STEPS = [20.0, 40.0, 40.0], [100, 50, 20]


def left(step_costs_left: list[float], **more: object) -> float | None:
    values: dict = dict(stage=0, step_seconds=None, timed_seconds={}, timed_steps={}, keys=["a", "b", "c"])
    return seconds_left(step_costs_left, COSTS, STEPS, **{**values, **more})


def test_time_left_is_cost_left_times_seconds_per_cost() -> None:
    assert left([20.0, 40.0, 40.0]) is None
    # a step of stage 0 costs 0.2 and takes 1 s: 5 s per unit of cost for everything that is left
    assert left([10.0, 40.0, 40.0], step_seconds=1.0) == pytest.approx(90 * 5)
    # in stage 1 a step costs 0.8; what stage 0 took does not count any more
    done = dict(timed_seconds={0: 500.0, 1: 10.0}, timed_steps={0: 100, 1: 5})
    assert left([0.0, 30.0, 40.0], stage=1, step_seconds=2.0, **done) == pytest.approx(70 * 2.5)


def test_time_left_takes_the_own_rate_of_settings_seen_before() -> None:
    # stage 2 repeats the work of stage 0 (10 s per unit of cost); the current stage 1 takes 2.5 s per unit
    seen = dict(timed_seconds={0: 200.0, 1: 10.0}, timed_steps={0: 100, 1: 5})
    assert left([0.0, 30.0, 40.0], stage=1, step_seconds=2.0, keys=["a", "b", "a"], **seen) == pytest.approx(
        30 * 2.5 + 40 * 10
    )


def test_time_left_just_after_a_switch_uses_all_that_was_timed() -> None:
    seen = dict(timed_seconds={0: 200.0}, timed_steps={0: 100})
    assert left([0.0, 40.0, 40.0], stage=1, **seen) == pytest.approx(80 * 10)
