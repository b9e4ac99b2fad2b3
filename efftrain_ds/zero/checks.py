"""What a change of parameters must satisfy before anything is touched, and how the ranks agree on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import RebuildError
from ..core.ranks import gather
from .blueprint import digest
from .groups import GroupPlan
from .request import Piece, RebuildRequest


@dataclass
class RebuildPlan:
    """A checked request: nothing has been touched yet."""

    request: RebuildRequest
    blueprint: nn.Module
    groups: GroupPlan
    shapes: dict[str, torch.Size]
    old_shapes: dict[str, torch.Size]
    trainable: list[str]
    step: int


def agree_equal(value: str, what: str) -> None:
    """Raise on all ranks where `value` differs between them. Collective.

    Raises:
        RebuildError: it differs.
    """
    values = gather(value)
    if len(set(values)) > 1:
        other = next(i for i, v in enumerate(values) if v != values[0])
        raise RebuildError(f"{what}: rank {other} asks for another change than rank 0; all ranks must ask for the same")


def identity_of(plan: RebuildPlan) -> str:
    """What all ranks must agree on: architecture, groups, and where every value comes from."""
    request = plan.request
    rows: list[Any] = [digest(plan.blueprint), plan.groups.to_plain(), sorted(request.drops)]
    rows += [request.values, request.reset, plan.step]
    for name, target in request.maps.items():
        rows.append([name, target.init is not None, target.moments])
        for piece in target.pieces:
            indices = [[sorted((d, [int(i) for i in v]) for d, v in side.items())] for side in (piece.take, piece.put)]
            rows.append([piece.source, indices, sorted(piece.scale.items())])
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def check_maps(request: RebuildRequest, new: Mapping[str, torch.Size], old: Mapping[str, torch.Size]) -> None:
    """Every new name has values of its shape, every old one is taken over or dropped.

    Raises:
        RebuildError: with the first five findings.
    """
    found: list[str] = []
    consumed: set[str] = set()
    for name in request.maps:
        if name not in new:
            found.append(f"map of {name}, which the new module does not have")
    for name, shape in new.items():
        target = request.maps.get(name)
        if target is None:
            if name not in old:
                found.append(f"{name} is new and has no map")
            elif old[name] != shape:
                found.append(f"{name} changes from {list(old[name])} to {list(shape)} and has no map")
            consumed.add(name)
            continue
        for piece in target.pieces:
            consumed.add(piece.source)
            if piece.source not in old:
                found.append(f"{name} is to come from {piece.source}, which the module does not have")
                continue
            fit = _piece_misfit(piece, old[piece.source], shape)
            if fit:
                found.append(f"{name} <- {piece.source}: {fit}")
    lost = sorted(set(old) - consumed - request.drops)
    if lost:
        found.append(f"nothing takes over {', '.join(lost[:5])}; list what is to go in drops")
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise RebuildError("; ".join(found[:5]) + more)


def _piece_misfit(piece: Piece, old: torch.Size, new: torch.Size) -> str:
    if len(old) != len(new):
        return f"{len(old)} dimensions against {len(new)}"
    odd = [dim for dim in (*piece.take, *piece.put) if not 0 <= dim < len(old)]
    if odd:
        return f"there is no dimension {odd[0]}"
    for dim, (have, want) in enumerate(zip(old, new, strict=True)):
        take = list(piece.take[dim]) if dim in piece.take else list(range(have))
        put = list(piece.put[dim]) if dim in piece.put else list(range(want))
        if len(take) != len(put):
            return f"dimension {dim}: {len(take)} values for {len(put)} places"
        if take and (min(take) < 0 or max(take) >= have):
            return f"dimension {dim}: an index is not in 0..{have - 1}"
        if put and (min(put) < 0 or max(put) >= want):
            return f"dimension {dim}: a place is not in 0..{want - 1}"
    return ""
