"""Functions run on the ranks by the tests of replay and larger early batches."""

from __future__ import annotations

import json
from pathlib import Path

from efftrain_ds.core.replay import loaded, total_loaded
from tests.distributed import train_jobs

BUFFERS = [{"bandwidth": 12, "uses": 2, "capacity": 4}, {"bandwidth": 20, "uses": 4, "capacity": 4}]

SHORT = {
    "efftrain/run/steps": 7,
    "efftrain/checkpoint/every": "3st",
    "efftrain/methods": {
        "efficienttrain": {
            "schedule": [{"until": 0.7143, "bandwidth": 12}, {"until": 1.0, "bandwidth": 28}],
            "pacing": "samples",
            "replay": BUFFERS[:1],
        }
    },
}
"""Changes for a run of 5 steps at 12 px with replay and 2 at 28 px without."""


def changes(*, replay: bool = True, large: bool = False, **more) -> dict:
    """Replay in the stages of 12 and 20 px; with `large` four times the batch at 12 px."""
    method: dict = {"schedule": "et++"}
    if replay:
        method["replay"] = BUFFERS
    if large:
        method["large_batch"] = {"ramp": 0.1}
    return {"efftrain/methods": {"efficienttrain": method}, "efftrain/observe/log_every": 1, **more}


def logged_run(folder: str, stage: int, **options) -> dict:
    """A run and what its journal says of every step."""
    trainer, screen = train_jobs.go(train_jobs.run_config(folder, stage, **changes(**options)))
    schedule, loader = trainer.schedule, trainer.run_parts.loader
    events = [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]
    result = {
        "steps": schedule.total_steps,
        "batches": [s.batch for s in schedule.stages],
        "loaded": [loaded(schedule, i + 1) for i in range(schedule.total_steps)],
        "total_loaded": total_loaded(schedule),
        "samples": schedule.total_samples,
        "consumed": loader.consumed,
        "log": [e for e in events if e["event"] == "log"],
        "sides": trainer.sides,
        "ids": [ids for *_, ids in trainer.losses],
        "screen": screen,
    }
    trainer.engine.destroy()
    return result


def resume_job(folder: str, stage: int, stops: list[int], large: bool, more: dict) -> dict:
    """`train_jobs.resume_run`, and what the resumed runs say of the buffer."""
    result = train_jobs.resume_run(folder, stage, stops, changes(large=large, **more))
    refills = {}
    for stop in stops:
        lines = (Path(folder) / f"stop{stop}" / "journal.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        refills[stop] = [e["samples"] for e in events if e["event"] == "replay_refill"]
    return {"problems": result["problems"], "refills": refills}
