"""Error hierarchy: every error a user can cause derives from `EffTrainError`.

A message says what is wrong, where (key path, or file and offset), what was found and what is allowed.
Invariants of our own code use ``assert`` instead.
"""

from __future__ import annotations


class EffTrainError(Exception):
    """Base of all errors that the user can act on. `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(EffTrainError, ValueError):
    """The DeepSpeed JSON or its ``"efftrain"`` section is wrong. Nothing was started."""


class PlanError(EffTrainError, ValueError):
    """The plan cannot run as written (method, model and budget do not fit together)."""

    exit_code = 3


class ModelError(EffTrainError, ValueError):
    """A method cannot take this model."""


class ShardError(EffTrainError, ValueError):
    """A shard, its manifest or one of its samples is missing, damaged or inconsistent."""


class CheckpointError(EffTrainError, ValueError):
    """A checkpoint is missing, damaged or belongs to another run."""


class RebuildError(EffTrainError, RuntimeError):
    """The ZeRO partitions could not be rebuilt; the previous state was kept."""


class RolledBackError(RebuildError):
    """A rebuild failed halfway; module and optimizer were made anew on all ranks, with the state before it."""


class DivergenceError(EffTrainError, RuntimeError):
    """Training diverged (non-finite loss or gradients in too many consecutive steps)."""

    exit_code = 76


class DesyncError(EffTrainError, RuntimeError):
    """The ranks decided differently; going on would train different models."""

    exit_code = 77


class Preempted(EffTrainError, RuntimeError):
    """The run was asked to stop, and everything is saved. The same command goes on from there."""

    exit_code = 75


STALL_EXIT_CODE = 78
"""What every rank of a stalled run returns; there is no exception, as the main thread does not answer any more."""


class NoEffectWarning(UserWarning):
    """A method is switched on but found nothing to act on."""
