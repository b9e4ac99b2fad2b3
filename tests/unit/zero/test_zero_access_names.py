"""Names of DeepSpeed that are not public and that changes of parameters depend on."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from efftrain_ds.core.errors import ConfigError, EffTrainError
from efftrain_ds.zero import access
from efftrain_ds.zero.agc import UnitClip


def test_left_behind_by_stage_3():
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cells = getattr(coordinator, access._RELEASE_CACHE).__closure__
    assert any(hasattr(cell.cell_contents, "cache_clear") for cell in cells)


def test_engine_hooks_and_configuration():
    source = inspect.getsource(DeepSpeedEngine)
    for name in ("module_forward_pre_hook", "module_forward_post_hook", "training_dataloader", "has_moe_layers"):
        assert f"self.{name}" in source, name
    for name in access.COUNTERS:
        assert f"self.{name}" in source, name
    assert "zero_config" in inspect.getsource(DeepSpeedConfig)
    fields = DeepSpeedZeroConfig.model_fields
    for name in ("offload_optimizer", "offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "zenflow"):
        assert name in fields, name


def test_attributes_left_on_parameters():
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import mixed_precision_linkage

    linked = inspect.getsource(mixed_precision_linkage)
    zero3 = inspect.getsource(stage3) + inspect.getsource(parameter_offload)
    found = [name for name in access._LEFT_ON_PARAMETERS if name in linked or name in zero3]
    assert {"_hp_mapping", "get_full_hp_param", "_z3_optimizer"} <= set(found)


def test_cpu_adam_is_stepped_through_its_extension():
    from deepspeed.ops.adam import cpu_adam

    source = inspect.getsource(cpu_adam.DeepSpeedCPUAdam)
    assert "self.ds_opt_adam.adam_update(self.opt_id, state['step'], group['lr'], beta1, beta2" in source


def test_memory_formats_that_cannot_be_cut_are_refused():
    module = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters())
    engine = SimpleNamespace(optimizer=optimizer, module=module)
    with pytest.raises(EffTrainError, match="parameter weight is not contiguous.*use stage 1, 2 or 3"):
        access.layout_of(engine)
    module.to(memory_format=torch.contiguous_format)
    assert len(access.layout_of(engine).fragments) == 2


def test_unsupported_features_are_named(monkeypatch):
    class Section:
        def __init__(self, **values):
            self.__dict__.update(values)

    plain = {
        "offload_optimizer": None,
        "offload_param": None,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zenflow": None,
    }

    def engine(zero=(), **more):
        config = Section(zero_config=Section(**{**plain, **dict(zero)}))
        return Section(
            optimizer=object(), _config=config, has_moe_layers=False, mpu=None, seq_parallel_group=None, **more
        )

    nvme = Section(device=Section(value="nvme"))
    assert access.unsupported(engine()) is None
    for change, text in [
        ({"offload_optimizer": nvme}, "offload_optimizer.device nvme"),
        ({"offload_param": nvme}, "offload_param.device nvme"),
        ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"zenflow": object()}, "zenflow"),
    ]:
        assert text in access.unsupported(engine(change))
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    assert access.unsupported(engine()) is None
    assert "DS_PIN_MEMORY_BACKEND=native with offload" in access.unsupported(
        engine({"offload_optimizer": Section(device=Section(value="cpu"), ratio=1.0)})
    )
    experts = engine()
    experts.has_moe_layers = True
    assert "mixture of experts" in access.unsupported(experts)
    parallel = engine()
    parallel.mpu = object()
    assert "tensor or pipeline" in access.unsupported(parallel)


@pytest.mark.parametrize("key", ["fused_lamb_legacy", "fused_adam_legacy"])
def test_gradients_beside_the_parameters_cannot_be_clipped_by_unit(monkeypatch, key):
    monkeypatch.setattr(access, "unsupported", lambda *a: None)
    engine = SimpleNamespace(optimizer=SimpleNamespace(**{key: True}))
    with pytest.raises(ConfigError, match=f"{key}: .* beside the parameters .*; use stage 1, 2 or 3"):
        UnitClip(engine, 0.1)
    assert access.gradients_beside(SimpleNamespace(optimizer=SimpleNamespace(**{key: False}))) is None
    assert any(key in names for names in access.private_names().values())
