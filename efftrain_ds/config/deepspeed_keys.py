"""Checks of DeepSpeed's own part of the file that need no DeepSpeed: key names and batch arithmetic.

DeepSpeed ignores unknown top-level keys without a word, so a typo there trains with a default. The lists below were
read from DeepSpeed 0.19.8 (every key that `DeepSpeedConfig` looks up); a test compares them with the installed one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .deepspeed_sections import check_sections
from .describe import kind_of, show
from .issues import ConfigIssues, Issue

KNOWN_KEYS: tuple[str, ...] = (
    "activation_checkpointing",
    "aio",
    "allgather_size",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_parallel_size",
    "data_types",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "hybrid_engine",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""Top-level keys that DeepSpeed reads."""

REMOVED_KEYS: dict[str, str] = {
    "nebula": "",
    "compression_training": "",
    "amp": 'Use "bf16", "fp16" or "torch_autocast"',
    "quantize_training": "",
    "sparse_gradients": "",
    "eigenvalue": "",
    "sparse_attention": "",
    "elasticity": "Set the batch sizes directly",
    "graph_harvesting": "",
    "curriculum_learning": 'Use "data_efficiency.data_sampling.curriculum_learning"',
    "progressive_layer_drop": "",
}
"""Top-level keys that DeepSpeed 0.19.8 refuses, with what to use instead."""

REMOVED_ZERO_KEYS: dict[str, str] = {
    "mics_shard_size": "",
    "mics_hierarchical_params_gather": "",
    "zeropp_loco_param": "",
}
"""Keys of "zero_optimization" that DeepSpeed 0.19.8 refuses."""

BATCH, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_CLOSE = 0.8


@dataclass(frozen=True)
class BatchSizes:
    """The three batch sizes of a run.

    Attributes:
        batch: samples of one optimizer step over all ranks.
        micro_batch: samples of one rank in one forward.
        accumulation: micro-batches of one optimizer step.
    """

    batch: int
    micro_batch: int
    accumulation: int


def batch_sizes(deepspeed: Mapping[str, Any], world: int) -> BatchSizes:
    """Fill in the batch sizes that are not given, by the rules of DeepSpeed 0.19.8 (`_set_batch_related_parameters`).

    Args:
        deepspeed: DeepSpeed's configuration.
        world: number of data-parallel ranks.

    Raises:
        ConfigError: none is given, one is not a whole number > 0, or they do not multiply.
    """
    issues = _check_batch(deepspeed, world)
    if issues:
        raise ConfigIssues(issues, "the batch sizes")
    batch, micro, accumulation = (deepspeed.get(key) for key in (BATCH, MICRO, ACCUMULATION))
    if batch is None:
        accumulation = accumulation or 1
        batch = micro * accumulation * world
    elif micro is None:
        accumulation = accumulation or 1
        micro = batch // world // accumulation
    elif accumulation is None:
        accumulation = batch // micro // world
    return BatchSizes(batch, micro, accumulation)


def check_deepspeed(deepspeed: Mapping[str, Any], world: int | None = None) -> tuple[list[Issue], list[Issue]]:
    """Errors and warnings of DeepSpeed's part of the file.

    Args:
        deepspeed: the configuration without its "efftrain" section.
        world: number of data-parallel ranks where it is known.
    """
    errors: list[Issue] = []
    warnings: list[Issue] = []
    for key in deepspeed:
        if key in KNOWN_KEYS or key[:1] in ("_", "$"):  # "$schema" and "_comment" are for editors and people
            continue
        if key in REMOVED_KEYS:
            errors.append(Issue(key, _removed_text(REMOVED_KEYS[key])))
            continue
        close = difflib.get_close_matches(key, (*KNOWN_KEYS, "efftrain"), n=1, cutoff=_CLOSE)
        if close:
            errors.append(Issue(key, f'unknown key, which DeepSpeed would ignore. Did you mean "{close[0]}"?'))
        else:
            warnings.append(Issue(key, "not a key of DeepSpeed, which ignores it"))
    zero = deepspeed.get("zero_optimization")
    if isinstance(zero, Mapping):
        errors += [
            Issue(f"zero_optimization.{key}", _removed_text(hint))
            for key, hint in REMOVED_ZERO_KEYS.items()
            if key in zero
        ]
    errors += check_sections(deepspeed, REMOVED_ZERO_KEYS)
    errors += _check_batch(deepspeed, world)
    if "gradient_clipping" not in deepspeed:
        warnings.append(
            Issue("gradient_clipping", "not given, so DeepSpeed clips to norm 1.0; write 0.0 for no clipping")
        )
    return errors, warnings


def _removed_text(hint: str) -> str:
    return "removed from DeepSpeed, which refuses the key. " + (hint or "Delete it")


def _check_batch(deepspeed: Mapping[str, Any], world: int | None) -> list[Issue]:
    given = {key: deepspeed[key] for key in (BATCH, MICRO, ACCUMULATION) if deepspeed.get(key) is not None}
    issues = [
        Issue(key, f"found {show(value)}, allowed: a whole number > 0")
        for key, value in given.items()
        if kind_of(value) != "integer" or value <= 0
    ]
    if world is not None and world <= 0:
        issues.append(Issue("world", f"found {world}, allowed: a whole number > 0"))
    if issues:
        return issues
    if BATCH not in given and MICRO not in given:
        return [Issue(BATCH, f'missing. DeepSpeed needs this key or "{MICRO}"')]
    if BATCH not in given:
        return []
    factors = {key: given[key] for key in (MICRO, ACCUMULATION) if key in given}
    if world is not None:
        factors["world"] = world
    product = math.prod(factors.values())
    if len(factors) == 3 and given[BATCH] != product:
        numbers = " x ".join(str(value) for value in factors.values())
        return [Issue(BATCH, f"{given[BATCH]} != {numbers} ({' x '.join(factors)})")]
    if given[BATCH] % product:
        words = " x ".join(f"{name} {value}" for name, value in factors.items())
        return [Issue(BATCH, f"{given[BATCH]} is not a multiple of {words}")]
    return []
