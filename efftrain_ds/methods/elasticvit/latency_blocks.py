"""Latency by blocks that are measured on this machine's processor, each once and only when a sub-network needs it.

Writing a whole sub-network as ONNX takes many seconds, too many for each candidate of a search. Sub-networks share most
of their blocks, so the sum over measured blocks is soon known for nearly all of them; `BlockLatency.compare` tells how
far such sums may be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...cost.throughput import machine_name
from ...models.elastic import HybridSpace, PlainSpace, Space
from .latency import Coverage, LatencyTable, TableLatency, Timing, calibrated
from .latency_keys import block_keys
from .latency_ort import OrtLatency, onnx_bytes, require, session_of, time_sessions

TOGETHER = 32
"""Blocks that are timed in interleaved rounds at a time."""


OPENINGS = ("firstconv_", "patch_")
"""What the keys of the blocks begin with that stand in front."""


def _without(timing: Timing, call: float) -> Timing:
    """A block's own time, of which some is always left."""
    return replace(timing, **{name: max(getattr(timing, name) - call, 1e-6) for name in ("median", "p10", "p90")})


class _Attention(nn.Module):
    """First half of a transformer layer of a hybrid network."""

    def __init__(self, layer: Any, side: int) -> None:
        super().__init__()
        self.norm, self.attn, self.side = layer.norm1, layer.attn, side

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x), self.side)


class _Ffn(nn.Module):
    """Second half."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = layer.norm2, layer.fc1, layer.fc2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.hardswish(self.fc1(self.norm(x))))


class _Patch(nn.Module):
    """What stands in front of the blocks of a plain transformer."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.norm_pre(self.net.patch_drop(self.net._pos_embed(self.net.patch_embed(x))))


class _Half(nn.Module):
    """Attention or MLP of a timm block, with its normalisation and shortcut."""

    def __init__(self, norm: nn.Module, core: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.norm, self.core, self.scale = norm, core, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.core(self.norm(x)))


class _Head(nn.Module):
    """What stands behind the blocks of a plain transformer."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_head(self.net.norm(x))


def parts(space: Space[Any], net: Any, config: Any) -> Iterator[tuple[str, nn.Module, bool]]:
    """Parts of an extracted network in running order; run one behind the other they are the network.

    Args:
        space: of the sub-network.
        net: from `Space.extract`.
        config: of the sub-network.

    Yields:
        (key, module, 1 if maps must become tokens in front of it, -1 the other way, else 0).

    Raises:
        ConfigError: a kind of space without a grammar of keys.
    """
    keys = iter(block_keys(space, config))
    if isinstance(space, HybridSpace):
        yield next(keys), net.first, 0
        tokens = False
        for place, (spec, stage) in enumerate(zip(space.stages, net.stages, strict=True)):
            if not spec.is_vit:
                for block in stage.blocks:
                    yield next(keys), block, 0
                continue
            yield next(keys), stage.first, -1 if tokens else 0
            side = space.side(config.resolution, place)
            for number, layer in enumerate(stage.layers):
                yield next(keys), _Attention(layer, side), 0 if number else 1
                yield next(keys), _Ffn(layer), 0
            tokens = True
        yield next(keys), net.head, 0
    elif isinstance(space, PlainSpace):
        yield next(keys), _Patch(net), 0
        for block in net.blocks:
            yield next(keys), _Half(block.norm1, block.attn, block.ls1), 0
            yield next(keys), _Half(block.norm2, block.mlp, block.ls2), 0
        yield next(keys), _Head(net), 0
    assert next(keys, None) is None


def _shaped(x: Tensor, change: int) -> Tensor:
    """Maps [B, C, H, W] as tokens [B, N, C], or the other way."""
    if change > 0:
        return x.flatten(2).transpose(1, 2)
    if change < 0:
        side = round(x.shape[1] ** 0.5)
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
    return x


class BlockLatency:
    """A provider: sums over blocks that ONNX Runtime times on this processor, one image at a time.

    What a call of ONNX Runtime takes is measured with them and taken out of all blocks but the first of a network.

    Args:
        space: of the supernet.
        net: supernet whose weights are used; a fresh one if None (times do not depend on the weights).
        table: of earlier measurements on this machine, to go on from.
        file: to which the table is written whenever it has changed; None writes none.
        threads: of the sessions.
        warmup: runs before the first round.
        runs: of each block in all, at least.
        rounds: interleaved.
        tell: shows how far a long measurement is.

    Raises:
        ConfigError: a package is missing, or the table is of another space or kind of network, of another machine,
            version of ONNX Runtime or number of threads.
    """

    unit = "ms"

    def __init__(
        self,
        space: Space[Any],
        net: nn.Module | None = None,
        *,
        table: LatencyTable | None = None,
        file: Path | None = None,
        threads: int = 1,
        warmup: int = 10,
        runs: int = 50,
        rounds: int = 3,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        require()
        import onnxruntime

        self.space, self.device, self._tell = space, machine_name(), tell
        self._net = space.supernet() if net is None else net
        runtime, options = f"onnxruntime {onnxruntime.__version__}", space.options(self._net)
        if table is not None:
            TableLatency(space, table, options)
            if (table.device, table.runtime, table.threads) != (self.device, runtime, threads):
                raise ConfigError(
                    f"the latency table is of {table.device}, {table.runtime} with {table.threads} threads; this is "
                    f"{self.device}, {runtime} with {threads}"
                )
        self._entries: dict[str, Timing] = {} if table is None else dict(table.entries)
        self.table = table or LatencyTable(
            self.device, runtime, threads, 1, "float32", space.hash, self._entries, options=options
        )
        self._file = file
        self._threads, self._times = threads, {"warmup": warmup, "runs": runs, "rounds": rounds}

    @property
    def entries(self) -> Mapping[str, Timing]:
        """Times so far, by key."""
        return self._entries

    def keys(self, config: Any) -> list[str]:
        """Keys of the blocks of a sub-network, with repeats."""
        return block_keys(self.space, config)

    def measure(self, configs: Sequence[Any]) -> None:
        """Time the blocks of sub-networks that have no time yet.

        Raises:
            ModelError: a sub-network that the space does not have, or a block that cannot be written as ONNX.
        """
        waiting: dict[str, tuple[Any, Any]] = {}
        for config in configs:
            if any(key not in self._entries and key not in waiting for key in self.keys(config)):
                net = self.space.extract(self._net, config).eval().float().cpu()
                x = torch.zeros(1, getattr(self.space, "in_chans", 3), config.resolution, config.resolution)
                for key, module, change in parts(self.space, net, config):
                    x = _shaped(x, change)
                    if key not in self._entries and key not in waiting:
                        waiting[key] = session_of(onnx_bytes(module.eval(), x), self._threads), x.numpy()
                    with torch.no_grad():
                        x = module(x)
            if len(waiting) >= TOGETHER:
                self._time(waiting)
        self._time(waiting)

    def _time(self, waiting: dict[str, tuple[Any, Any]]) -> None:
        if not waiting:
            return
        nothing = torch.zeros(1, 1)
        call = session_of(onnx_bytes(nn.Identity(), nothing), self._threads)
        sessions, inputs = zip(*waiting.values(), (call, nothing.numpy()), strict=True)
        *found, empty = time_sessions(sessions, inputs, **self._times)
        for key, one in zip(waiting, found, strict=True):
            # a network is one call: its opening keeps it
            self._entries[key] = one.timing() if key.startswith(OPENINGS) else _without(one.timing(), empty.median)
        waiting.clear()
        self._keep(replace(self.table, entries=self._entries))
        self._tell(f"{len(self._entries):,} blocks measured")

    def _keep(self, table: LatencyTable) -> None:
        self.table = table
        if self._file is not None:
            table.save(self._file)

    def predict(self, config: Any) -> float:
        """Sum over the blocks in milliseconds, after those without a time are measured."""
        self.measure([config])
        return TableLatency(self.space, self.table).predict(config)

    def compare(self, configs: Sequence[Any]) -> LatencyTable:
        """Compare sums with whole networks, take over the scale that fits best, and return the table.

        Args:
            configs: of the comparison, 20 at least if the outcome is to mean anything (`latency.trusted`).
        """
        self.table = replace(self.table, scale=1.0)
        sums = [self.predict(config) for config in configs]
        whole = OrtLatency(self.space, self._net, threads=self._threads, **self._times).measure(configs)
        self._keep(calibrated(self.table, sums, [one.median for one in whole]))
        return self.table

    def coverage(self, space: Space[Any]) -> Coverage:
        """Everything: what is missing is measured."""
        return Coverage(0, 0, {})
