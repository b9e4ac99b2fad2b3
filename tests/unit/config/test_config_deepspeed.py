"""DeepSpeed's part of the file: names, batch arithmetic, and the comparison with the installed DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from efftrain_ds.config import deepspeed_sections as sections
from efftrain_ds.config.deepspeed_keys import (
    KNOWN_KEYS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    BatchSizes,
    batch_sizes,
    check_deepspeed,
)
from efftrain_ds.core.errors import ConfigError

B, M, A = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
REFUSED = "removed from DeepSpeed, which refuses the key. "


def errors(world: int | None = None, **config: Any) -> list[tuple[str, str]]:
    return [(issue.key, issue.text) for issue in check_deepspeed(config, world)[0]]


def warnings(**config: Any) -> list[tuple[str, str]]:
    return [(issue.key, issue.text) for issue in check_deepspeed(config)[1]]


def installed_config(config: dict[str, Any]) -> Any:
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(config)


class Recorder(dict):
    """A dictionary that notes every key that is looked up."""

    seen: set[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        recorder = self

        class Keys:
            def __contains__(self, key: object) -> bool:
                return key in recorder

            def __iter__(self) -> Iterator[str]:
                return iter(list(dict.keys(recorder)))

        return Keys()

    def __copy__(self) -> Recorder:
        return self


def test_no_key_that_the_installed_deepspeed_reads_is_missing() -> None:
    recorder = Recorder({B: 4})
    installed_config(recorder)
    assert len(recorder.seen) > 50
    assert recorder.seen - set(REMOVED_KEYS) - set(KNOWN_KEYS) == set()


def test_removed_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config

    assert set(REMOVED_KEYS) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(REMOVED_ZERO_KEYS) == set(config._REMOVED_ZERO_CONFIG_KEYS)
    assert not set(REMOVED_KEYS) & set(KNOWN_KEYS)
    assert list(KNOWN_KEYS) == sorted(set(KNOWN_KEYS))


def test_section_keys_are_those_of_the_installed_deepspeed() -> None:
    import torch
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for known, model in [
        (sections.ZERO_KEYS, DeepSpeedZeroConfig),
        (sections.OFFLOAD_PARAM_KEYS, offload_config.DeepSpeedZeroOffloadParamConfig),
        (sections.OFFLOAD_OPTIMIZER_KEYS, offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        (sections.BF16_KEYS, precision_config.DeepSpeedBF16Config),
        (sections.FP16_KEYS, precision_config.DeepSpeedFP16Config),
    ]:
        names = {name for key, field in model.model_fields.items() for name in (key, field.alias or key)}
        assert set(known) | set(REMOVED_ZERO_KEYS) >= names
        assert set(known) <= names
    assert {name.lower() for name in sections.OPTIMIZERS} == set(DEEPSPEED_OPTIMIZERS)
    assert set(sections.SCHEDULERS) == set(VALID_LR_SCHEDULES)
    assert all(hasattr(torch.optim, name) for name in sections.TORCH_OPTIMIZERS)


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        ({"zero_optimization": {"stagee": 2}}, "zero_optimization.stagee", 'Did you mean "stage"?'),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage", "found 7, allowed: 0, 1, 2, 3"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            'Did you mean "device"?',
        ),
        ({"bf16": {"enable": True}}, "bf16.enable", 'Did you mean "enabled"?'),
        ({"optimizer": {"type": "AdamWW"}}, "optimizer.type", 'Did you mean "AdamW"?'),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms", 'Did you mean "params"?'),
        ({"scheduler": {"type": "X"}}, "scheduler.type", "allowed: LRRangeTest"),
    ],
)
def test_mistakes_inside_sections(change: dict[str, Any], key: str, text: str) -> None:
    found, _ = check_deepspeed({B: 4, "gradient_clipping": 1.0, **change})
    assert [issue.key for issue in found] == [key]
    assert text in found[0].text


def test_sound_sections_pass() -> None:
    config = {
        B: 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "_note": 1},
        "bf16": {"enabled": True},
        "optimizer": {"type": "adamw", "params": {"lr": 1e-3, "anything": 1}},
        "scheduler": {"type": "WarmupCosineLR", "params": {}},
    }
    assert check_deepspeed(config)[0] == []


@pytest.mark.parametrize(
    "config",
    [
        {B: 24, M: 4, A: 6},
        {B: 24, M: 4},
        {B: 24, A: 6},
        {M: 4, A: 6},
        {B: 24},
        {M: 4},
        {B: 24, M: None, A: None},
        {B: 24, M: 24, A: 1},
    ],
)
def test_batch_sizes_equal_deepspeed(config: dict[str, Any]) -> None:
    theirs = installed_config(dict(config))
    ours = batch_sizes(config, 1)
    assert ours == BatchSizes(
        theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps
    )


@pytest.mark.parametrize(
    "config", [{B: 128, M: 48}, {B: 7, A: 2}, {B: 4, M: 8}, {B: 8, M: 2, A: 2}, {A: 2}, {}, {B: 0}]
)
def test_deepspeed_refuses_what_we_refuse(config: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        installed_config(dict(config))
    with pytest.raises(ConfigError):
        batch_sizes(config, 1)


@pytest.mark.parametrize(
    ("config", "world", "sizes"),
    [
        ({B: 128}, 4, (128, 32, 1)),
        ({M: 8}, 4, (32, 8, 1)),
        ({M: 8, A: 3}, 4, (96, 8, 3)),
        ({B: 128, A: 2}, 4, (128, 16, 2)),
        ({B: 128, M: 8}, 4, (128, 8, 4)),
        ({B: 128, M: 8, A: 4}, 4, (128, 8, 4)),
    ],
)
def test_batch_sizes_with_ranks(config: dict[str, int], world: int, sizes: tuple[int, int, int]) -> None:
    result = batch_sizes(config, world)
    assert (result.batch, result.micro_batch, result.accumulation) == sizes
    assert result.batch == result.micro_batch * result.accumulation * world


@pytest.mark.parametrize(
    ("config", "world", "key", "text"),
    [
        ({B: 128, M: 2, A: 24}, 1, B, f"128 != 2 x 24 x 1 ({M} x {A} x world)"),
        ({B: 128, M: 2, A: 24}, None, B, f"128 is not a multiple of {M} 2 x {A} 24"),
        ({B: 128, M: 48}, 2, B, f"128 is not a multiple of {M} 48 x world 2"),
        ({B: 128, M: 48}, None, B, f"128 is not a multiple of {M} 48"),
        ({B: 128, A: 3}, 2, B, f"128 is not a multiple of {A} 3 x world 2"),
        ({B: 128}, 3, B, "128 is not a multiple of world 3"),
        ({}, 1, B, f'missing. DeepSpeed needs this key or "{M}"'),
        ({A: 2}, None, B, f'missing. DeepSpeed needs this key or "{M}"'),
        ({B: "auto"}, None, B, 'found "auto", allowed: a whole number > 0'),
        ({B: 128.0}, None, B, "found 128.0, allowed: a whole number > 0"),
        ({B: True}, None, B, "found true, allowed: a whole number > 0"),
        ({M: 0}, 1, M, "found 0, allowed: a whole number > 0"),
        ({M: 2}, 0, "world", "found 0, allowed: a whole number > 0"),
    ],
)
def test_batch_errors(config: dict[str, Any], world: int | None, key: str, text: str) -> None:
    assert errors(world, **config) == [(key, text)]
    if world is not None:
        with pytest.raises(ConfigError) as caught:
            batch_sizes(config, world)
        assert str(caught.value).splitlines()[1] == f"  {key}   {text}"


def test_good_batches_have_no_errors() -> None:
    assert errors(1, **{B: 128, M: 64, A: 2}) == []
    assert errors(None, **{B: 128, M: 64, A: 1}) == []  # right with two ranks
    assert errors(None, **{M: 64}) == []


def test_typos_are_errors_and_strange_keys_are_warnings() -> None:
    config = {
        B: 4,
        "gradient_clippingg": 1,
        "zero_optimisation": {},
        "eftrain": {},
        "my_notes": 1,
        "gradient_clipping": 0,
    }
    ignored = "unknown key, which DeepSpeed would ignore. Did you mean "
    assert errors(**config) == [
        ("gradient_clippingg", ignored + '"gradient_clipping"?'),
        ("zero_optimisation", ignored + '"zero_optimization"?'),
        ("eftrain", ignored + '"efftrain"?'),
    ]
    assert warnings(**config) == [("my_notes", "not a key of DeepSpeed, which ignores it")]


def test_keys_for_editors_and_people_pass() -> None:
    config = {B: 4, "gradient_clipping": 1.0, "$schema": "x", "_comment": "y"}
    assert check_deepspeed(config) == ([], [])


@pytest.mark.parametrize("key", sorted(REMOVED_KEYS))
def test_every_removed_key_is_named(key: str) -> None:
    (found,) = errors(**{B: 4, key: {}})
    assert found[0] == key
    assert found[1].startswith(REFUSED)
    assert len(found[1]) > len(REFUSED)


def test_removed_zero_keys() -> None:
    config = {B: 4, "zero_optimization": {"stage": 3, "mics_shard_size": 8, "zeropp_loco_param": {}}}
    assert errors(**config) == [
        ("zero_optimization.mics_shard_size", REFUSED + "Delete it"),
        ("zero_optimization.zeropp_loco_param", REFUSED + "Delete it"),
    ]
    assert errors(**{B: 4, "zero_optimization": True}) == []


def test_missing_gradient_clipping_is_a_warning() -> None:
    text = "not given, so DeepSpeed clips to norm 1.0; write 0.0 for no clipping"
    assert warnings(**{B: 4}) == [("gradient_clipping", text)]
    assert warnings(**{B: 4, "gradient_clipping": 0.0}) == []
    assert installed_config({B: 4}).gradient_clipping == 1.0
