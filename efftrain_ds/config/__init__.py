"""The efftrain section of the DeepSpeed JSON: models, loading, explained errors, JSON Schema."""

from .deepspeed_keys import BatchSizes, batch_sizes
from .loader import LoadedConfig, load_config
from .schema import json_schema
from .sections import EffTrainConfig

__all__ = ["BatchSizes", "EffTrainConfig", "LoadedConfig", "batch_sizes", "json_schema", "load_config"]
