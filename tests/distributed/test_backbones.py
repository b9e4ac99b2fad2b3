"""Every family of backbones under a curriculum of image sizes with DeepSpeed."""

from __future__ import annotations

import pytest

from tests.distributed import backbone_jobs as jobs
from tests.distributed import train_jobs
from tests.unit.models.tiny_backbones import FAMILIES, TINY

pytestmark = pytest.mark.dist

PUBLISHED = [96, 128, 160, 192, 224]


def check(results: list[dict], bandwidths: list[int]) -> None:
    for result in results:
        assert result["sides"] == [b for b in bandwidths for _ in range(jobs.STEPS)] + bandwidths[-1:]
        assert result["still"] == {b: [] for b in bandwidths}
        assert result["names"] == result["expected"] > 10
        assert result["same_parameters"]
        assert result["same_in_optimizer"]
        assert result["shape"] == (2, 5)
        assert all(loss == loss for loss in result["losses"])


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        ("swin", 1),
        *(pytest.param(family, stage, marks=pytest.mark.slow) for family in ("swin", "cswin") for stage in (2, 3)),
    ],
)
def test_every_parameter_trains_after_a_switch(ranks, family, stage):
    check(ranks(jobs.curriculum, family, 96, [64, 96], stage), [64, 96])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_trains_at_every_published_size(ranks, family):
    check(ranks(jobs.curriculum, family, 224, PUBLISHED), PUBLISHED)


def test_the_trap_that_the_adapter_avoids(ranks):
    for result in ranks(jobs.trapped, 64, 32):
        assert len(result["lost"]) == 8
        assert all(name.endswith("relative_position_bias_table") for name in result["lost"])


def changes_for(family: str) -> dict:
    """A run of a small model on the bundled images, with its one switch (32 to 64 pixels) after 4 of 5 steps."""
    name, kwargs = TINY[family]
    kwargs = {**kwargs, "window_size": 2} if family == "swin" else kwargs
    stages = [{"until": 0.5, "bandwidth": 32}, {"until": 1.0, "bandwidth": 64}]
    return {
        "efftrain/model/name": name,
        "efftrain/model/kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()},
        "efftrain/data/resolution": 64,
        "efftrain/run/steps": 5,
        "efftrain/methods": {"efficienttrain": {"schedule": stages}},
    }


# without CAFormer and VOLO: timm fixes their sizes by name, and the real ones are large for this
@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) for f in TINY])
def test_resume_at_a_switch_is_the_same_run(ranks, tmp_path, family):
    for result in ranks(train_jobs.resume_run, str(tmp_path), 1, [4], changes_for(family)):
        assert result["problems"] == []
        assert {(step, side) for step, side, _ in result["sides"]} == {(0, 32), (1, 32), (2, 32), (3, 32), (4, 64)}
