"""The blocks of all sub-networks of a space, measured once on this machine: a table that any search can use.

Sums over blocks stand for whole networks only as far as a comparison says, so that belongs to the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...core.errors import ConfigError
from ...core.rng import numpy_rng
from ...models.elastic import HybridSpace, PlainSpace, Space
from .latency import Coverage, LatencyTable, load_latency, trusted
from .latency_keys import block_keys

COMPARED = 20
"""Random sub-networks that are measured as a whole, too."""


def blocks_of(space: Space[Any]) -> dict[str, Any]:
    """Keys of the blocks of all sub-networks of a space, each with a sub-network that has it.

    Raises:
        ConfigError: a kind of space without a grammar of keys.
    """
    found: dict[str, Any] = {}
    for config in _covering(space):
        for key in block_keys(space, config):
            found.setdefault(key, config)
    return found


def _covering(space: Space[Any]) -> Iterator[Any]:
    """Sub-networks that have all blocks of a space between them."""
    if isinstance(space, HybridSpace):
        return _covering_hybrid(space)
    if isinstance(space, PlainSpace):
        return _covering_plain(space)
    raise ConfigError(f"{type(space).__name__} has no grammar for keys of blocks")


def _covering_hybrid(space: HybridSpace) -> Iterator[Any]:
    """Each pair of neighbouring widths with each choice of the rest, at each resolution.

    The second layer of a stage is like all further ones, so the depths are the least ones above one.
    """
    depths = {
        spec.name: min((depth for depth in spec.depths if depth > 1), default=max(spec.depths)) for spec in space.stages
    }
    rest = [column for column, one in enumerate(space.dimensions) if one.kind in ("expand", "kernel", "mlp", "v_scale")]
    stage_of = [one.name.partition(".")[0] for one in space.dimensions]
    for widths in _width_paths(space):
        path = iter(widths)
        row: list[Any] = []
        for one, stage in zip(space.dimensions, stage_of, strict=True):
            row.append(depths[stage] if one.kind == "depth" else next(path) if one.kind == "width" else one.choices[0])
        for resolution in space.resolutions:
            row[0] = resolution
            # all stages run through the combinations of their own two choices at once
            pairs = [[c for c in rest if stage_of[c] == spec.name] for spec in space.stages]
            sizes = [[len(space.dimensions[c].choices) for c in columns] for columns in pairs]
            for turn in range(max(int(np.prod(size)) for size in sizes)):
                for columns, size in zip(pairs, sizes, strict=True):
                    place = turn % int(np.prod(size))
                    for column, choice in zip(columns, np.unravel_index(place, size), strict=True):
                        row[column] = space.dimensions[column].choices[int(choice)]
                yield space.from_values(row)


def _width_paths(space: HybridSpace) -> Iterator[tuple[int, ...]]:
    """Widths of all stages, so that every pair that two neighbours can have is among them."""
    choices = [spec.widths for spec in space.stages]
    seen: set[tuple[int, int, int]] = set()
    for place in range(1, len(choices)):
        for before in choices[place - 1]:
            for after in choices[place]:
                if before > after or (place, before, after) in seen:
                    continue
                path = [before, after]
                for earlier in reversed(choices[: place - 1]):
                    path.insert(0, max((width for width in earlier if width <= path[0]), default=0))
                for later in choices[place + 1 :]:
                    path.append(min((width for width in later if width >= path[-1]), default=0))
                if all(0 < a <= b for a, b in zip(path, path[1:], strict=False)):
                    seen.update((j, *pair) for j, pair in enumerate(zip(path, path[1:], strict=False), 1))
                    yield tuple(path)


def _covering_plain(space: PlainSpace) -> Iterator[Any]:
    """Layers run through the numbers of heads and the ratios of the MLP, at each width and resolution."""
    top = space.top
    longest = max(len(space.heads), len(space.mlp))
    for resolution in space.resolutions:
        for width in space.widths:
            for begin in range(0, longest, top):
                heads = [space.heads[(begin + block) % len(space.heads)] for block in range(top)]
                mlp = [space.mlp[(begin + block) % len(space.mlp)] for block in range(top)]
                yield space.make(width, top, heads, mlp, resolution)


def measure_table(
    space: Space[Any],
    net: nn.Module,
    file: Path,
    *,
    compared: int = COMPARED,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
    **times: int,
) -> LatencyTable:
    """Measure all blocks of a space with ONNX Runtime on this machine, and compare their sums with whole networks.

    Goes on with a table that is there already; the comparison is made anew.

    Args:
        space: of the supernet.
        net: supernet, of whose kind the blocks are.
        file: of the table; written as it grows.
        compared: different random sub-networks of the comparison.
        seed: of these.
        tell: shows a line.
        **times: `warmup`, `runs` and `rounds` of `BlockLatency`.

    Returns:
        The table with the scale that fits whole networks best.

    Raises:
        ConfigError: a missing package, a table there that does not fit, or a file that cannot be written.
    """
    from .latency_blocks import BlockLatency

    try:
        table = load_latency(file) if file.exists() else None
        provider = BlockLatency(space, net, table=table, file=file, tell=tell, **times)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error
    wanted = blocks_of(space)
    missing = [key for key in wanted if key not in provider.entries]
    tell(f"{len(wanted):,} blocks in all sub-networks of the space, {len(missing):,} to measure")
    provider.measure(list(dict.fromkeys(wanted[key] for key in missing)))
    rows = space.sample_codes(numpy_rng(seed, "latency comparison"), 20 * compared)
    configs = list(dict.fromkeys(space.config(row) for row in rows))[:compared]
    tell(f"comparing sums with {len(configs)} random sub-networks as a whole")
    return provider.compare(configs)


def trust_text(table: LatencyTable) -> str:
    """Whether sums of a table stand for whole networks, in words."""
    if table.error is None or table.rank is None:
        return "uncalibrated: sums were never compared with whole networks"
    found = f"mean error {100 * table.error:.1f}%, rank correlation {table.rank:.3f} against whole networks"
    return f"calibrated: {found}" if trusted(table) else f"uncalibrated: {found}; 15% and 0.95 are needed"


def provider_text(provider: Any, space: Space[Any]) -> str:
    """What a provider prices and how far it can be trusted, in a line."""
    words = [f"{provider.device}, in {provider.unit}"]
    table = getattr(provider, "table", None)
    if isinstance(table, LatencyTable):
        threads = "" if table.threads is None else f" with {table.threads} thread{'s' * (table.threads > 1)}"
        words = [f"{table.device}, {table.runtime}{threads}, in {table.unit}, {len(table.entries):,} blocks known"]
    look: Callable[[Space[Any]], Coverage] | None = getattr(provider, "coverage", None)
    coverage = look(space) if look is not None else None
    if coverage is not None and coverage.sampled:
        words.append(f"prices {coverage.covered} of {coverage.sampled} random sub-networks")
        missing: Mapping[str, int] = coverage.missing
        if missing:
            words[-1] += f', lacks {len(missing):,} blocks such as "{max(missing, key=lambda key: missing[key])}"'
    if isinstance(table, LatencyTable):
        words.append(trust_text(table))
    return "; ".join(words)
