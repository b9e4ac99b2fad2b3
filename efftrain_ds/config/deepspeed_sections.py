"""Keys inside DeepSpeed's own sections, which DeepSpeed reports late, on every rank, or not at all.

Read from DeepSpeed 0.19.8; a test compares the tables with the installed one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from .describe import show
from .issues import Issue

ZERO_KEYS: tuple[str, ...] = (
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm",
    "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "leaf_module",
    "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings", "max_live_parameters",
    "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold", "module_granularity_threshold",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply", "param_persistence_threshold",
    "parameter_alignment", "pipeline_loading_checkpoint", "prefetch_bucket_size", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size", "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)  # fmt: skip
OFFLOAD_PARAM_KEYS: tuple[str, ...] = (
    "buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory",
)  # fmt: skip
OFFLOAD_OPTIMIZER_KEYS: tuple[str, ...] = (
    "buffer_count", "cpuadam_cores_perc", "device", "fast_init", "nvme_path", "pin_memory", "pipeline_read",
    "pipeline_write", "ratio", "super_offload",
)  # fmt: skip
BF16_KEYS: tuple[str, ...] = (
    "bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "enabled",
    "immediate_grad_update",
)  # fmt: skip
FP16_KEYS: tuple[str, ...] = (
    "auto_cast", "consecutive_hysteresis", "enabled", "fp16_master_weights_and_grads", "hysteresis",
    "initial_scale_power", "loss_scale", "loss_scale_window", "min_loss_scale",
)  # fmt: skip
SCHEDULERS: tuple[str, ...] = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
OPTIMIZERS: tuple[str, ...] = ("Adagrad", "Adam", "AdamW", "Lamb", "MuAdam", "MuAdamW", "MuSGD", "Lion", "Muon")
"""DeepSpeed's own, in any case of letters; other names are looked up in torch.optim."""
TORCH_OPTIMIZERS: tuple[str, ...] = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD", "SparseAdam",
)  # fmt: skip

SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_param": OFFLOAD_PARAM_KEYS,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER_KEYS,
    "bf16": BF16_KEYS,
    "fp16": FP16_KEYS,
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
}
"""Known keys by section."""


def check_sections(deepspeed: Mapping[str, Any], removed: Mapping[str, str]) -> Iterator[Issue]:
    """Unknown keys and impossible values inside DeepSpeed's sections.

    Args:
        deepspeed: DeepSpeed's configuration.
        removed: keys of "zero_optimization" that are reported elsewhere.
    """
    for path, known in SECTIONS.items():
        section: Any = deepspeed
        for part in path.split("."):
            section = section.get(part) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping):
            yield from _unknown(path, section, known, removed)
    zero = deepspeed.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage not in (0, 1, 2, 3):
        yield Issue("zero_optimization.stage", f"found {show(stage)}, allowed: 0, 1, 2, 3")
    yield from _named(deepspeed, "optimizer", OPTIMIZERS, (*OPTIMIZERS, *TORCH_OPTIMIZERS))
    yield from _named(deepspeed, "scheduler", (), SCHEDULERS)


def _unknown(path: str, section: Mapping[str, Any], known: tuple[str, ...], removed: Mapping[str, str]) -> Iterator:
    for key in section:
        if key in known or key[:1] in ("_", "$") or (path == "zero_optimization" and key in removed):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        hint = (
            f'Did you mean "{close[0]}"?'
            if close
            else f"Allowed: {', '.join(known[:12])}" + (", ..." if len(known) > 12 else "")
        )
        yield Issue(f"{path}.{key}", f"unknown key. {hint}")


def _named(
    deepspeed: Mapping[str, Any], path: str, any_case: tuple[str, ...], allowed: tuple[str, ...]
) -> Iterator[Issue]:
    section = deepspeed.get(path)
    name = section.get("type") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or name in allowed or name.lower() in {other.lower() for other in any_case}:
        return
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f'Did you mean "{close[0]}"?' if close else f"allowed: {', '.join(dict.fromkeys(allowed))}"
    yield Issue(f"{path}.type", f"found {show(name)}. {hint}")
