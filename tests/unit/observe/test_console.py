import io
from dataclasses import replace

from efftrain_ds.core.timeline import Stage
from efftrain_ds.observe.console import (
    Console,
    RunState,
    StageOutcome,
    StartInfo,
    eval_line,
    final_table,
    lr_text,
    run_line,
    stage_lines,
    start_block,
)

STATE = RunState(
    step=1250,
    total_steps=62_500,
    epoch=4.0,
    epochs=200.0,
    stage=1,
    stages=9,
    label="B128 m3",
    loss=4.8121,
    lr=9.8e-4,
    grad_norm=1.2093,
    images_per_s=2914.2,
    unit="gpu",
    data_share=0.031,
    memory=41.2e9,
    cost_done=0.0091,
    seconds_left=6 * 3600 + 12 * 60 + 8,
)


def test_run_line_exact() -> None:
    assert run_line(STATE) == (
        "step 1,250/62,500  ep 4.0/200  stage 2/9 B128 m3 | loss 4.812 | lr 9.8e-4 | gnorm 1.21 | 2,914 img/s/gpu | "
        "data 3% | 41 GB | done 2.0% of steps, 0.9% of cost | left 6h12m"
    )


def test_run_line_without_what_is_not_known() -> None:
    bare = replace(
        STATE, epoch=None, epochs=None, label="", grad_norm=None, images_per_s=None, data_share=None, memory=None,
        seconds_left=None,
    )  # fmt: skip
    assert run_line(bare) == (
        "step 1,250/62,500  stage 2/9 | loss 4.812 | lr 9.8e-4 | done 2.0% of steps, 0.9% of cost"
    )
    more = replace(STATE, mfu=0.612, unit="rank", images_per_s=31.26, epochs=454.63)
    assert "| 31.3 img/s/rank | 61% MFU |" in run_line(more)
    assert "ep 4.0/454.6 " in run_line(more)


def test_learning_rates() -> None:
    assert [lr_text(v) for v in (9.8e-4, 1e-6, 0.0, 0.1, 4e-3)] == ["9.8e-4", "1.0e-6", "0", "1.0e-1", "4.0e-3"]


INFO = StartInfo(
    run_id="smoke-1",
    resumed_from=None,
    resumed_step=0,
    model="vit_tiny",
    params=5_520_000,
    resolution=32,
    zero_stage=1,
    precision="fp32",
    world=2,
    device="cpu",
    batch=128,
    methods=[("efficienttrain", "B16 m0 -> B32 m9 in 10 stages"), ("other", "")],
    plan=["250 steps", "x0.98 of 10 dense epochs"],
    data="bundled:fashion_mnist/train",
    samples=6000,
    val_samples=2000,
    output="runs/smoke",
    tensorboard="tensorboard --logdir runs/smoke/tensorboard",
)


def test_start_block() -> None:
    assert start_block(INFO).splitlines() == [
        "run     smoke-1, fresh start",
        "model   vit_tiny, 5.52 M parameters, 32 px",
        "engine  ZeRO-1, fp32, 2 ranks on cpu",
        "method  efficienttrain: B16 m0 -> B32 m9 in 10 stages",
        "        other",
        "plan    250 steps",
        "        x0.98 of 10 dense epochs",
        "data    bundled:fashion_mnist/train: 6,000 samples, 2,000 held out, batch 128",
        "output  runs/smoke",
        "watch   tensorboard --logdir runs/smoke/tensorboard",
    ]


def test_start_block_of_a_resumed_run() -> None:
    text = start_block(
        replace(INFO, resumed_from="step-00000400", resumed_step=400, methods=(), val_samples=None, tensorboard=None)
    )
    assert "run     smoke-1, resumed from step-00000400 (step 400)" in text
    assert "method  none" in text
    assert "no evaluation" in text
    assert "watch" not in text


def stage(index: int, settings: dict, micro: int, accumulation: int) -> Stage:
    return Stage(index, 100 * index, 100 * index + 100, 0.1, 0.2, settings, 1.0, 128, micro, accumulation)


def test_stage_lines() -> None:
    old = stage(1, {"bandwidth": 96, "ra_magnitude": 1.0}, 64, 1)
    new = stage(2, {"bandwidth": 160, "ra_magnitude": 2.0}, 16, 4)
    assert stage_lines(old, new, 10, why="20% of the budget spent", world=2).splitlines() == [
        "--- stage 3/10 at step 200, 100 steps (20% of the budget spent)",
        "    changes: bandwidth 96 -> 160, ra_magnitude 1 -> 2",
        "    batch 128 = 16 x 4 x 2, before 64 x 1 (micro-batch x accumulation x ranks)",
    ]
    first = stage_lines(None, stage(0, {"bandwidth": 96}, 64, 1), 10).splitlines()
    assert first[1:] == ["    settings: B96", "    batch 128 = 64 x 1 (micro-batch x accumulation)"]
    dropped = stage_lines(stage(0, {"a": 1, "b": 2}, 1, 1), stage(1, {"a": 1, "c": 3}, 1, 1), 2)
    assert "changes: c - -> 3, b 2 -> -" in dropped
    assert "changes: none" in stage_lines(old, replace(old, index=2), 3)


def test_eval_line() -> None:
    text = eval_line(500, {"top1": 0.71304, "ema_top1": 0.72, "loss": 1.2104}, samples=2000, seconds=3.21,
                     best={"top1": 0.72})  # fmt: skip
    assert text == ("eval at step 500: top1 71.30% (best 72.00%), ema_top1 72.00%, loss 1.210 | 2,000 samples in 3.2s")


def test_final_table_with_predictions() -> None:
    rows = final_table(
        [StageOutcome("B16 m0", 100, 0.2, 100.0, 150.0), StageOutcome("B32 m9", 50, 0.8, 400.0, 450.0)],
        {"eval": 12.0},
    ).splitlines()
    assert rows[0] == "plan against actual"
    assert rows[3].split() == ["1", "B16", "m0", "100", "20.0%", "25.0%", "1m40s", "2m30s", "+50.0%"]
    assert rows[4].split() == ["2", "B32", "m9", "50", "80.0%", "75.0%", "6m40s", "7m30s", "+12.5%"]
    assert rows[6].split() == ["total", "150", "100.0%", "100.0%", "8m20s", "10m00s", "+20.0%"]
    assert rows[7] == "beside the steps: eval 12s"


def test_final_table_without_predictions() -> None:
    rows = final_table([StageOutcome("full", 10, 1.0, None, 20.0)]).splitlines()
    assert "predicted" not in rows[1]
    assert rows[3].split() == ["1", "full", "10", "100.0%", "100.0%", "20s"]
    assert final_table([StageOutcome("full", 0, 1.0, None, 0.0)])  # nothing was timed: no division by zero


def test_only_rank_zero_speaks() -> None:
    streams = [io.StringIO(), io.StringIO()]
    for rank, stream in enumerate(streams):
        Console(rank, stream).write("line")
    assert [s.getvalue() for s in streams] == ["line\n", ""]
