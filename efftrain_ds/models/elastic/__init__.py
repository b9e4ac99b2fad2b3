"""Elastic models: supernets whose sub-networks use the leading part of each parameter, or some of the layers.

- `layers`, `norms`: layers that are told with the call how much of each axis to use.
- `depth`: paths through a stack of blocks; the container that runs them is `ElasticSequential` everywhere.
- `space`: what every search space can do; `hybrid_space` (ElasticViT) and `plain_space` (plain ViT) are the two.
- `hybrid`, `plain`: their networks. `plain` makes any timm ``VisionTransformer`` of the right size elastic.
- `subnets`: extracted networks in files.
"""

from __future__ import annotations

from ..stacks import ElasticSequential
from .depth import path_of, paths_for, set_paths, skipped_names, supernet_order
from .hybrid_space import HybridConfig, HybridSpace, StageConfig, StageSpec, elasticvit_space, released_subnets
from .plain_space import PlainConfig, PlainSpace, autoformer_space
from .space import Dimension, Space, SubnetConfig
from .subnets import load_extracted, read_space, save_extracted

__all__ = [
    "Dimension",
    "ElasticSequential",
    "HybridConfig",
    "HybridSpace",
    "PlainConfig",
    "PlainSpace",
    "Space",
    "StageConfig",
    "StageSpec",
    "SubnetConfig",
    "autoformer_space",
    "elasticvit_space",
    "load_extracted",
    "path_of",
    "paths_for",
    "read_space",
    "released_subnets",
    "save_extracted",
    "set_paths",
    "skipped_names",
    "supernet_order",
]
