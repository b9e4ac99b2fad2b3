"""The only file, beside `skip` and `native_files`, that touches private names of DeepSpeed.

`layout_of` describes where one rank keeps the fp32 masters and the optimizer state of every trainable parameter, for
ZeRO 0, 1, 2 and 3 in fp32, bf16 and fp16: *flats* (the tensors the base optimizer steps on) and *fragments* (which
stretch of which flat belongs to which stretch of which parameter). All tensors are views: nothing is copied.

Checked on the versions in `TESTED_VERSIONS`; `private_names` lists what is used, and a test names them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor, nn

from ..core.errors import EffTrainError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.19.8",)
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
_FUSED = "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer"
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# wrapper class -> attributes this file reads from it
_PRIVATE: dict[str, tuple[str, ...]] = {
    _ZERO12: ("bit16_groups", "single_partition_of_fp32_groups", "update_lp_params", "loss_scaler", "micro_step_id"),
    _BF16: ("bf16_groups", "fp32_groups_flat_partition", "update_lp_params"),
    _ZERO3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat",
        "sub_group_to_group_id",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "loss_scaler",
    ),
    _UNFUSED: ("fp16_groups", "fp32_groups", "loss_scale_config", "fused_lamb_legacy"),
    _FUSED: ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat", "loss_scale_config", "fused_adam_legacy"),
}


@dataclass
class Flat:
    """One local fp32 tensor that the base optimizer steps on.

    Attributes:
        master: fp32 values; the key of the base optimizer's state.
        group: index of its parameter group in the base optimizer.
    """

    master: Tensor
    group: int


@dataclass(frozen=True)
class Fragment:
    """A stretch of one parameter held by this rank.

    Attributes:
        name: parameter name in the module.
        start: first element in the flattened parameter.
        length: number of elements.
        flat: index into `Layout.flats`.
        offset: first element in that flat.
    """

    name: str
    start: int
    length: int
    flat: int
    offset: int


@dataclass
class Layout:
    """Where this rank keeps masters and optimizer state.

    Attributes:
        stage: ZeRO stage.
        replicated: True where every rank holds everything (stage 0).
        flats: local master tensors.
        fragments: local stretches of parameters.
        shapes: full shape of every trainable parameter, by name.
        groups: parameter-group index of every trainable parameter, by name.
        base: the base optimizer (its `state` is keyed by the masters).
        push: refresh the low-precision weights of all ranks from the masters (collective).
    """

    stage: int
    replicated: bool
    flats: list[Flat]
    fragments: list[Fragment]
    shapes: dict[str, torch.Size]
    groups: dict[str, int]
    base: Any
    push: Callable[[], None]

    def state_keys(self) -> list[str]:
        """Names of the optimizer-state tensors that have the shape of their flat (e.g. exp_avg, exp_avg_sq)."""
        keys: set[str] = set()
        for flat in self.flats:
            state = self.base.state.get(flat.master, {})
            keys |= {k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.master.shape}
        return sorted(keys)

    def values(self, fragment: Fragment, tensors: list[Tensor]) -> Tensor:
        """View of one fragment in a list of tensors that parallels `flats`. [length]"""
        return tensors[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.length)

    def tensors(self, key: str, create: bool = True) -> list[Tensor]:
        """Tensors parallel to `flats` for "fp32" or a state key.

        Where there is no state yet, zeros are put into the optimizer; with `create` false they are only returned.
        """
        if key == "fp32":
            return [flat.master.data for flat in self.flats]
        found = []
        for flat in self.flats:
            if not create:
                value = self.base.state.get(flat.master, {}).get(key)
                found.append(torch.zeros_like(flat.master.data) if value is None else value)
                continue
            state = self.base.state[flat.master]
            if key not in state:
                state[key] = torch.zeros_like(flat.master.data)
            found.append(state[key])
        return found

    def scalars(self, flat: int) -> dict[str, float]:
        """State of one flat that is a number (the step count)."""
        state = self.base.state.get(self.flats[flat].master, {})
        return {
            k: float(v)
            for k, v in state.items()
            if isinstance(v, (int, float)) or (torch.is_tensor(v) and v.dim() == 0)
        }

    def set_scalars(self, flat: int, values: dict[str, float]) -> None:
        """Write numbers in the form the base optimizer keeps them (0-dim float32 tensors for torch's own)."""
        master = self.flats[flat].master
        state = self.base.state[master]
        group = self.base.param_groups[self.flats[flat].group]
        # torch keeps the step on the host unless its fused or capturable form asks for the device
        device = master.device if group.get("fused") or group.get("capturable") else "cpu"
        torch_form = type(self.base).__module__.startswith("torch.")
        for key, value in values.items():
            state[key] = torch.tensor(value, dtype=torch.float32, device=device) if torch_form else int(value)


def private_names() -> dict[str, tuple[str, ...]]:
    """Private attributes in use, by DeepSpeed class."""
    return dict(_PRIVATE)


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def check_version() -> None:
    """Warn once where the installed DeepSpeed is not one this file was checked on."""
    if deepspeed.__version__.split("+")[0] not in TESTED_VERSIONS:
        logger.warning(
            "DeepSpeed %s is not one of the tested versions (%s); state access may fail",
            deepspeed.__version__,
            ", ".join(TESTED_VERSIONS),
        )


def _probe(optimizer: object) -> str:
    name = _class_name(optimizer)
    if text := missing_text(name, optimizer, _PRIVATE.get(name, ())):
        raise EffTrainError(text)
    return name


def missing_text(name: str, thing: object, attributes: Iterable[str]) -> str:
    """What to say of private attributes that this version of DeepSpeed does not have; "" where it has them all."""
    missing, tested = ", ".join(a for a in attributes if not hasattr(thing, a)), ", ".join(TESTED_VERSIONS)
    return f"DeepSpeed {deepspeed.__version__}: {name} has no {missing}; tested versions: {tested}" if missing else ""


def layout_of(engine: Any) -> Layout:
    """Layout of a DeepSpeedEngine's master weights on this rank.

    Raises:
        EffTrainError: the optimizer class or a feature of it is not supported.
    """
    optimizer = engine.optimizer
    if optimizer is None:
        raise EffTrainError("the DeepSpeed engine has no optimizer, so there is no training state to read")
    names = {id(p): n for n, p in engine.module.named_parameters()}
    name = _probe(optimizer)
    if getattr(optimizer, "round_robin_gradients", False):
        raise EffTrainError("zero_optimization.round_robin_gradients: not supported (its parameter map is wrong)")
    if name == _ZERO12:
        return _zero12(optimizer, names, engine.zero_optimization_stage())
    if name == _BF16:
        return _bf16(optimizer, names)
    if name == _ZERO3:
        return _zero3(optimizer, names)
    if name == _UNFUSED:
        return _unfused(optimizer, names)
    if name == _FUSED:
        return _fused(optimizer, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _plain(optimizer, names)
    raise EffTrainError(f"optimizer {name} is not supported; allowed: ZeRO 0-3 in fp32, bf16 or fp16")


def _linked(groups: list, flats: list[Tensor], names: dict[int, str]) -> tuple[list, list, dict, dict]:
    """Fragments of the optimizers that link parameters to flats through `_hp_mapping` (ZeRO 1, 2 and BF16)."""
    fragments, shapes, owner = [], {}, {}
    for index, group in enumerate(groups):
        for param in group:
            name = names[id(param)]
            shapes[name], owner[name] = param.shape, index
            link = param._hp_mapping
            if link is not None:
                low, high = link.lp_fragment_address, link.hp_fragment_address
                fragments.append(Fragment(name, low.start, low.numel, index, high.start))
    return [Flat(flat, i) for i, flat in enumerate(flats)], fragments, shapes, owner


def _zero12(optimizer: Any, names: dict[int, str], stage: int) -> Layout:
    parts = _linked(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    return Layout(stage, False, *parts, optimizer.optimizer, optimizer.update_lp_params)


def _bf16(optimizer: Any, names: dict[int, str]) -> Layout:
    parts = _linked(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    return Layout(1, False, *parts, optimizer.optimizer, optimizer.update_lp_params)


def _zero3(optimizer: Any, names: dict[int, str]) -> Layout:
    flats, fragments, shapes, owner = [], [], {}, {}
    for index, params in enumerate(optimizer.fp16_groups):
        group = optimizer.sub_group_to_group_id[index]
        flats.append(Flat(optimizer.fp32_partitioned_groups_flat[index], group))
        offset = 0
        for param in params:
            name, part = names[id(param)], param.partition_numel()
            rank = torch.distributed.get_rank(param.ds_process_group)
            shapes[name], owner[name] = param.ds_shape, group
            start = rank * part
            length = min(part, param.ds_numel - start)
            if length > 0:
                fragments.append(Fragment(name, start, length, index, offset))
            offset += part

    def push() -> None:
        optimizer.checkpoint_event_prologue()
        for low, high in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            if low.data_ptr() != high.data_ptr():
                low.data.copy_(high.data)
        optimizer.checkpoint_event_epilogue()

    return Layout(3, False, flats, fragments, shapes, owner, optimizer.optimizer, push)


def _whole(groups: list, names: dict[int, str], masters: list) -> tuple[list, list, dict, dict]:
    flats, fragments, shapes, owner = [], [], {}, {}
    for index, (params, masters_of_group) in enumerate(zip(groups, masters, strict=True)):
        for param, master in zip(params, masters_of_group, strict=True):
            name = names[id(param)]
            if not master.is_contiguous():
                raise EffTrainError(
                    f"parameter {name} is not contiguous (channels_last?), so its state cannot be cut at "
                    "zero_optimization.stage 0; use stage 1, 2 or 3, or model.to(memory_format=torch.contiguous_format)"
                )
            shapes[name], owner[name] = param.shape, index
            fragments.append(Fragment(name, 0, param.numel(), len(flats), 0))
            flats.append(Flat(master, index))
    return flats, fragments, shapes, owner


def _unfused(optimizer: Any, names: dict[int, str]) -> Layout:
    parts = _whole(optimizer.fp16_groups, names, optimizer.fp32_groups)

    def push() -> None:
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(low, high, strict=True):
                param.data.copy_(master.data)

    return Layout(0, True, *parts, optimizer.optimizer, push)


def _fused(optimizer: Any, names: dict[int, str]) -> Layout:
    flats, fragments, shapes, owner = [], [], {}, {}
    for index, params in enumerate(optimizer.fp16_groups):
        flats.append(Flat(optimizer.fp32_groups_flat[index], index))
        offset = 0
        for param in params:
            name = names[id(param)]
            shapes[name], owner[name] = param.shape, index
            fragments.append(Fragment(name, 0, param.numel(), index, offset))
            offset += param.numel()

    def push() -> None:
        # after the first step the parameters are no longer views of fp16_groups_flat, so each is written by itself
        for params, high in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for param in params:
                param.data.copy_(high.data.narrow(0, offset, param.numel()).view_as(param))
                offset += param.numel()

    return Layout(0, True, flats, fragments, shapes, owner, optimizer.optimizer, push)


def _plain(optimizer: Any, names: dict[int, str]) -> Layout:
    groups = [[p for p in g["params"] if p.requires_grad] for g in optimizer.param_groups]
    parts = _whole(groups, names, groups)
    return Layout(0, True, *parts, optimizer, lambda: None)


def _scaler(engine: Any) -> Any | None:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def scaler_state(engine: Any) -> dict[str, float]:
    """Fields of the loss scaler (empty without one)."""
    scaler = _scaler(engine)
    found = {name: getattr(scaler, name, None) for name in _SCALER_FIELDS} if scaler is not None else {}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def load_scaler_state(engine: Any, state: dict[str, float]) -> None:
    """Write what `scaler_state` returned."""
    scaler = _scaler(engine)
    for name, value in state.items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def counters(engine: Any) -> dict[str, int]:
    """The engine's step counters."""
    return {name: int(getattr(engine, name)) for name in COUNTERS}


def load_counters(engine: Any, values: dict[str, int]) -> None:
    """Write what `counters` returned.

    A checkpoint lies between optimizer steps, so the micro-step counter is put on a multiple of *this* engine's
    accumulation, which may differ from the one at saving (another stage, another world size).
    """
    for name in COUNTERS:
        setattr(engine, name, values[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def at_boundary(engine: Any) -> bool:
    """True between two optimizer steps (no gradient is being accumulated)."""
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def set_batch(engine: Any, micro_batch: int, accumulation: int) -> None:
    """Change micro-batch and accumulation between two optimizer steps.

    DeepSpeed's own setters change one at a time, keep the micro-step counter (which then no longer ends on a multiple
    of the new accumulation) and the throughput timer's first batch size; all of it is put right here.
    """
    assert at_boundary(engine), "the batch may change only between optimizer steps"
    if (micro_batch, accumulation) == (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()):
        return
    batch = micro_batch * accumulation * engine.dp_world_size
    engine.set_train_micro_batch_size(micro_batch)
    engine.set_train_batch_size(batch)
    engine.micro_steps = engine.global_steps * accumulation
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation
    timer = getattr(engine, "tput_timer", None)
    if timer is not None:
        timer.batch_size = batch


def gather_full(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Context in which ZeRO-3 parameters are whole (no effect on other stages); `modifier_rank` may write."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank, enabled=bool(partitioned))


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def frozen_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters without gradient (they have no master)."""
    return ((name, p) for name, p in module.named_parameters() if not p.requires_grad)


def frozen_fragments(engine: Any) -> tuple[list[tuple[str, int, Tensor]], frozenset[str], dict[str, torch.Size]]:
    """This rank's part of the parameters that have no master.

    Returns:
        (name, first element, 1-D view of the weight's dtype) of each; names that every rank holds whole; shapes.
    """
    held, replicated, shapes = [], set(), {}
    for name, parameter in frozen_parameters(engine.module):
        shapes[name] = full_shape(parameter)
        if not hasattr(parameter, "ds_id"):
            held.append((name, 0, parameter.data.reshape(-1)))
            replicated.add(name)
            continue
        start, part = partition(parameter)
        if part.numel():
            held.append((name, start, part))
    return held, frozenset(replicated), shapes


def partition(parameter: nn.Parameter) -> tuple[int, Tensor]:
    """(first element, 1-D view) of this rank's part of a parameter that ZeRO-3 has partitioned; padding is left out."""
    part = parameter.partition_numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * part
    return start, parameter.ds_tensor.data.view(-1)[: max(0, min(part, parameter.ds_numel - start))]


def zero_skipped_gradients(engine: Any, names: Iterable[str]) -> None:
    """Set the gradients of parameters that took no part in this step to zero, before ``engine.step()``.

    ZeRO-3 keeps every parameter's last gradient partition and would apply (and count in the norm) a stale one; the
    other stages fill missing gradients with zeros by themselves.
    """
    if _class_name(engine.optimizer) != _ZERO3:
        return
    named = dict(engine.module.named_parameters())
    for name in names:
        parameter = named[name]
        if parameter.requires_grad:
            local = deepspeed.utils.safe_get_local_grad(parameter)
            deepspeed.utils.safe_set_local_grad(parameter, torch.zeros_like(local))


def unsupported(engine: Any, where: str = "where parameters change in mid-run") -> str | None:
    """Why masters, gradients and state of this engine are not where they are looked for; None where they are.

    Args:
        engine: a DeepSpeedEngine.
        where: what needs them, for the text.
    """
    optimizer, zero = engine.optimizer, engine._config.zero_config
    name = _class_name(optimizer)
    if getattr(optimizer, "round_robin_gradients", False):
        return "zero_optimization.round_robin_gradients: not supported (its parameter map is wrong)"
    if name in (_UNFUSED, _FUSED) and engine.fp16_enabled():
        return (
            "fp16 with zero_optimization.stage 0: DeepSpeed does not scale the loss there; use stage 1, 2 or 3, or bf16"
        )
    checks = {
        "zero_optimization.offload_optimizer.device nvme": _device(zero.offload_optimizer) == "nvme",
        "zero_optimization.offload_param.device nvme": _device(zero.offload_param) == "nvme",
        "zero_optimization.zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
        "zero_optimization.zero_quantized_weights": zero.zero_quantized_weights,
        "zero_optimization.zenflow": getattr(zero, "zenflow", None) is not None,
        "mixture of experts": getattr(engine, "has_moe_layers", False),
        "tensor or pipeline parallelism": getattr(engine, "mpu", None) is not None,
        "sequence parallelism": getattr(engine, "seq_parallel_group", None) is not None
        and torch.distributed.get_world_size(engine.seq_parallel_group) > 1,
    }
    checks["zero_optimization.offload_optimizer.ratio below 1"] = (
        zero.offload_optimizer is not None and float(getattr(zero.offload_optimizer, "ratio", 1.0)) != 1.0
    )
    offloads = _device(zero.offload_optimizer) != "none" or _device(zero.offload_param) != "none"
    # the old state must outlive the old engine, whose end frees such memory
    checks["DS_PIN_MEMORY_BACKEND=native with offload"] = (
        offloads and os.environ.get("DS_PIN_MEMORY_BACKEND", "torch").strip().lower() == "native"
    )
    checks["fp16 with torch_autocast"] = getattr(optimizer, "torch_autocast_gradscaler", None) is not None
    found = [key for key, bad in checks.items() if bad]
    return f"{found[0]}: not supported {where}" if found else None


def gradients_beside(engine: Any) -> str | None:
    """Why gradients do not lie on the masters when the base optimizer steps; None where they do.

    Stage 0's wrappers hand them to some optimizers as an argument.
    """
    for key in ("fused_lamb_legacy", "fused_adam_legacy"):
        if getattr(engine.optimizer, key, False):
            return (
                f"{key}: DeepSpeed hands the gradients over beside the parameters at zero_optimization.stage 0; use "
                "stage 1, 2 or 3"
            )
    return None


def unreadable(engine: Any) -> str | None:
    """Why this engine's optimizer state cannot be found or grouped by name; None where it can."""
    try:
        layout = layout_of(engine)
    except EffTrainError as error:
        return str(error)
    if any("name" not in group for group in layout.base.param_groups):
        return "the optimizer function drops the names of the parameter groups, which a change of parameters needs"
    return None


def _device(section: Any) -> str:
    return str(getattr(getattr(section, "device", None), "value", "none")) if section is not None else "none"


def unmapped_state(layout: Layout) -> list[str]:
    """State of the base optimizer that is neither a number nor shaped like its flat, so that it cannot be moved."""
    found = set()
    for flat in layout.flats:
        for key, value in layout.base.state.get(flat.master, {}).items():
            number = value is None or isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)
            if not number and not (torch.is_tensor(value) and value.shape == flat.master.shape):
                found.add(f"{key} ({type(value).__name__})")
    return sorted(found)


def tear_down(engine: Any) -> None:
    """Destroy a DeepSpeedEngine and undo what `destroy` leaves behind, so that nothing keeps the module alive.

    The caller drops its own references and collects garbage afterwards (engine and optimizer are in cycles).
    """
    module, optimizer = engine.module, engine.optimizer
    for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if handle is not None:
            handle.remove()
    engine.destroy()
    if _class_name(optimizer) == _ZERO3:
        from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

        parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not module]
        coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
        # the cached function sits inside a profiling wrapper that hides it
        for cell in getattr(coordinator, _RELEASE_CACHE).__closure__ or ():
            getattr(cell.cell_contents, "cache_clear", lambda: None)()
    for parameter in module.parameters():
        for attribute in _LEFT_ON_PARAMETERS:
            parameter.__dict__.pop(attribute, None)
    engine.optimizer = engine.lr_scheduler = None


_RELEASE_CACHE = "_PartitionedParameterCoordinator__params_to_release"
_LEFT_ON_PARAMETERS = (
    "_hp_mapping", "_dp_group", "get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad",
    "_z3_optimizer", "_z3_grad_accum_offload",
)  # fmt: skip
"""Attributes that link parameters to the old optimizer (checked on 0.19.8; absent ones do no harm)."""


def continue_from(engine: Any, old: dict[str, Any]) -> None:
    """Take over what `carried` returned from the engine before."""
    load_counters(engine, old["counters"])
    load_scaler_state(engine, old["scaler"])
    engine.training_dataloader = old["training_dataloader"]


def carried(engine: Any) -> dict[str, Any]:
    """Counters, loss scaler and the like of an engine that will be replaced."""
    loader = engine.training_dataloader
    return {"counters": counters(engine), "scaler": scaler_state(engine), "training_dataloader": loader}


def offloaded(engine: Any, what: Literal["param", "optimizer"]) -> bool:
    """True where ZeRO-3's weights, or the optimizer's state, are in host memory."""
    return _device(getattr(engine._config.zero_config, f"offload_{what}")) != "none"


def replay_steps(layout: Layout) -> None:
    """Bring DeepSpeed's CPU Adam to the step count of its state.

    It keeps the powers of beta as a running product inside its extension; a new object would start from pow(), which
    differs in the last bits. Stepping a dummy of one element as often gives the running product again.
    """
    base = layout.base
    if type(base).__name__ != "DeepSpeedCPUAdam":
        return
    steps = max((int(layout.scalars(i).get("step", 0)) for i in range(len(layout.flats))), default=0)
    if not steps:
        return
    group = base.param_groups[0]
    beta1, beta2 = group["betas"]
    weight, grad, first, second = (torch.zeros(1) for _ in range(4))
    # with several flats the count is out of step after the first of them, and the product is computed anew each time
    replayed = range(1, steps + 1) if len(layout.flats) == 1 else (steps, steps)
    for step in replayed:
        base.ds_opt_adam.adam_update(
            base.opt_id, step, 0.0, beta1, beta2, group["eps"], 0.0, True, weight, grad, first, second
        )  # fmt: skip
