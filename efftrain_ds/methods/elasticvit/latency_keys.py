"""Keys of the blocks of a sub-network, under which tables of latencies hold their times.

The keys of ElasticViT's blocks follow the grammar of the published block tables of nn-Meter, so that
those can be imported: fields joined by ``_``, sides of the maps in front of a block, rounded up where they are odd.

- ``firstconv_{side}_{channels}_{width}_2_3``: the opening convolution
- ``conv_{side}_{inputs}_{width}_{expand}_{stride}_hard_swish_{kernel}_{se|nose}``: an inverted-residual block
- ``transds_{side}_{inputs}_{width}_{stride}_6``: the first block of a transformer stage
- ``transattn_{side}_{width}_hard_swish_{v_scale}_ln`` and ``transffn_{side}_{width}_{mlp}_hard_swish_ln``
- ``mbpool_{side}_{width}_{features}_6_hard_swish``: the head

Plain transformers have ``patch_{side}_{patch}_{width}``, ``attn_{tokens}_{width}_{heads}_{head_dim}``,
``mlp_{tokens}_{width}_{hidden}`` and ``head_{width}_{classes}``.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import ConfigError
from ...models.elastic import HybridConfig, HybridSpace, PlainConfig, PlainSpace, Space


def block_keys(space: Space[Any], config: Any) -> list[str]:
    """Keys of the blocks of a sub-network, in running order, with repeats.

    Raises:
        ConfigError: a kind of space without a grammar.
    """
    if isinstance(space, HybridSpace):
        return _hybrid_keys(space, config)
    if isinstance(space, PlainSpace):
        return _plain_keys(space, config)
    raise ConfigError(f"{type(space).__name__} has no grammar for keys of blocks")


def _hybrid_keys(space: HybridSpace, config: HybridConfig) -> list[str]:
    keys = [f"firstconv_{config.resolution}_{space.in_chans}_{config.stages[0].width}_2_3"]
    side, inputs = -(-config.resolution // 2), config.stages[0].width
    for spec, stage in zip(space.stages, config.stages, strict=True):
        before, side = side, -(-side // spec.stride)
        width = stage.width
        if spec.is_vit:
            keys.append(f"transds_{before}_{inputs}_{width}_{spec.stride}_{space.first_expand}")
            attention = f"transattn_{side}_{width}_hard_swish_{stage.v_scale}_ln"
            keys += [attention, f"transffn_{side}_{width}_{stage.mlp}_hard_swish_ln"] * stage.depth
        else:
            end = f"hard_swish_{stage.kernel}_{'se' if spec.se else 'nose'}"
            keys.append(f"conv_{before}_{inputs}_{width}_{stage.expand}_{spec.stride}_{end}")
            keys += [f"conv_{side}_{width}_{width}_{stage.expand}_1_{end}"] * (stage.depth - 1)
        inputs = width
    keys.append(f"mbpool_{side}_{inputs}_{space.head_width}_{space.head_expand}_hard_swish")
    return keys


def _plain_keys(space: PlainSpace, config: PlainConfig) -> list[str]:
    tokens = (config.resolution // space.patch) ** 2 + int(space.class_token)
    width = config.width
    keys = [f"patch_{config.resolution}_{space.patch}_{width}"]
    for heads, ratio in zip(config.heads, config.mlp, strict=True):
        keys += [f"attn_{tokens}_{width}_{heads}_{space.head_dim}", f"mlp_{tokens}_{width}_{int(width * ratio)}"]
    return [*keys, f"head_{width}_{space.num_classes}"]
