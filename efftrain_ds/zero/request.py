"""What a method asks for when parameters must change: a change of the module, and where every new value comes from.

A request is plain data. Values are addressed by parameter name, so the same request serves every ZeRO stage, and it
can be printed (`RebuildRequest.table`) and tested without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import RebuildError

Init = Callable[[torch.Size, torch.Generator], Tensor]
"""Makes initial values: (shape, generator) -> fp32 tensor on the host."""


@dataclass(frozen=True)
class Piece:
    """Part of an old tensor that goes into a new one.

    Attributes:
        source: name of the old parameter or buffer.
        take: indices read from the source, by dimension (a missing dimension is read whole).
        put: indices written in the new tensor, by dimension (a missing dimension is written whole).
        scale: factor by state key ("fp32" is the value itself, then "exp_avg", "exp_avg_sq", ...); missing keys are 1.
    """

    source: str
    take: Mapping[int, Sequence[int]] = field(default_factory=dict)
    put: Mapping[int, Sequence[int]] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """True where the source is copied as it is."""
        return not self.take and not self.put and not self.scale


@dataclass(frozen=True)
class ParameterMap:
    """Where a new tensor comes from.

    Attributes:
        pieces: parts of old tensors; what no piece writes has the values of `init`.
        init: initial values; None means zeros.
        moments: False starts the optimizer state of this tensor at zero with a step count of its own.
    """

    pieces: tuple[Piece, ...] = ()
    init: Init | None = None
    moments: bool = True


def copy(source: str) -> ParameterMap:
    """The whole old tensor `source`, its optimizer state included (also for clones: one source, many targets)."""
    return ParameterMap((Piece(source),))


def gather(source: str, indices: Mapping[int, Sequence[int]]) -> ParameterMap:
    """Some rows, columns or heads of an old tensor, in the given order."""
    return ParameterMap((Piece(source, take=indices),))


def zeros() -> ParameterMap:
    """Zeros, with optimizer state that starts at zero."""
    return ParameterMap(moments=False)


def fresh(init: Init) -> ParameterMap:
    """Newly drawn values, with optimizer state that starts at zero."""
    return ParameterMap(init=init, moments=False)


def _unchanged(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class RebuildRequest:
    """A change of parameters at an optimizer boundary.

    Attributes:
        surgery: changes the *blueprint* (the module on the meta device, buffers real) and returns it.
        maps: by name in the new module (parameters and buffers); a name that is not here keeps its old value, which
            must have the same name and shape.
        drops: old names that nothing takes over.
        values: "ema" takes all new values from the average of the weights instead of the weights (MoGrow).
        reset: True starts the whole optimizer state at zero and its step count at 0.
        reason: a few words for screen and journal, e.g. "depth 6 -> 8".
        composed: made by `compose_requests`: maps of names that the second request did away with are left in, because
            only the new module can tell them from names that stay.
    """

    surgery: Callable[[nn.Module], nn.Module] = _unchanged
    maps: Mapping[str, ParameterMap] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    values: Literal["online", "ema"] = "online"
    reset: bool = False
    reason: str = ""
    composed: bool = False

    def table(self) -> list[str]:
        """The map in words, one line a tensor, e.g. ``"blocks.3.norm1.weight <- blocks.2.norm1.weight"``."""
        lines = []
        for name, target in self.maps.items():
            parts = [_piece_text(piece) for piece in target.pieces]
            if not parts:
                parts = ["fresh values" if target.init is not None else "zeros"]
            elif target.init is not None:
                parts.append("fresh values elsewhere")
            lines.append(f"{name} <- {' + '.join(parts)}" + ("" if target.moments else " (new optimizer state)"))
        return lines + [f"{name} dropped" for name in sorted(self.drops)]


def _piece_text(piece: Piece) -> str:
    text = piece.source
    for mark, indices in (("", piece.take), (" into ", piece.put)):
        if indices:
            text += mark + "[" + ", ".join(f"dim {dim}: {len(list(i))} indices" for dim, i in indices.items()) + "]"
    if piece.scale:
        text += " x " + ", ".join(f"{key} {value:g}" for key, value in piece.scale.items())
    return text


@dataclass(frozen=True)
class DrawnAs:
    """Initial values that are drawn under another tensor's name (a renaming must not change the numbers).

    Attributes:
        init: makes the values.
        name: the name that the values were asked for under.
    """

    init: Init
    name: str

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The initial values."""
        return self.init(shape, generator)


def compose_requests(first: RebuildRequest, second: RebuildRequest) -> RebuildRequest:
    """One request that does what `first` and then `second` do, to the bit.

    `second` is written in the names that `first` produces. Index sets of a piece are a product over dimensions, so
    the composition of two pieces is a piece again. (Two scales are multiplied first, which rounds differently from
    applying them in turn unless they are powers of two.)

    Raises:
        RebuildError: `second` mixes values of `first` in a way that one map cannot say (see `_composed`).
    """
    maps = dict(first.maps)
    composed = {name: _composed(name, target, maps) for name, target in second.maps.items()}
    drops = set(first.drops)
    for name in second.drops:
        drops |= {piece.source for piece in maps[name].pieces} if name in maps else {name}
    kept = {name: target for name, target in maps.items() if name not in second.drops and name not in composed}
    first_surgery, second_surgery = first.surgery, second.surgery
    return RebuildRequest(
        surgery=lambda model: second_surgery(first_surgery(model)),
        maps={**kept, **composed},
        drops=frozenset(drops),
        values="ema" if "ema" in (first.values, second.values) else "online",
        reset=first.reset or second.reset,
        reason="; ".join(r for r in (first.reason, second.reason) if r),
        composed=True,
    )


def _composed(name: str, target: ParameterMap, maps: Mapping[str, ParameterMap]) -> ParameterMap:
    """`target` (in the names that `maps` produces) in the names before `maps`.

    Raises:
        RebuildError: a part of newly initialised values, values that have holes over others, or tensors with and
            without a history of the optimizer in one.
    """
    pieces: list[Piece] = []
    init = target.init
    histories: set[bool] = set()
    for number, outer in enumerate(target.pieces):
        inner = maps.get(outer.source)
        if inner is None:
            pieces.append(outer)
            histories.add(True)
            continue
        histories.add(inner.moments)
        if inner.init is not None:
            if not outer.whole or len(target.pieces) > 1:
                raise RebuildError(
                    f"{name}: a part of {outer.source}, which an earlier request of this boundary initialises; "
                    "ask for it at the next boundary"
                )
            init = inner.init if isinstance(inner.init, DrawnAs) else DrawnAs(inner.init, outer.source)
        elif not inner.pieces or all(piece.put for piece in inner.pieces):
            # what inner leaves at zero would overwrite what lies under the outer piece
            if target.init is not None or any(_overlap(outer, other) for other in target.pieces[:number]):
                raise RebuildError(
                    f"{name}: {outer.source}, which an earlier request of this boundary assembles, goes over other "
                    "values; ask for it at the next boundary"
                )
        pieces += [piece for piece in (_through(piece, outer) for piece in inner.pieces) if piece is not None]
    if len(histories) == 2 and target.moments:
        raise RebuildError(
            f"{name}: made of tensors with optimizer state and of tensors whose state an earlier request of this "
            "boundary starts at zero; ask for it at the next boundary"
        )
    return ParameterMap(tuple(pieces), init, target.moments and False not in histories)


def _overlap(a: Piece, b: Piece) -> bool:
    return all(set(a.put[dim]) & set(b.put[dim]) for dim in {*a.put} & {*b.put})


def _through(inner: Piece, outer: Piece) -> Piece | None:
    """The piece that reads `inner`'s source where `outer` reads what `inner` wrote; None where they do not meet."""
    take: dict[int, list[int]] = {}
    put: dict[int, list[int]] = {}
    for dim in {*inner.take, *inner.put, *outer.take, *outer.put}:
        wrote = list(inner.put[dim]) if dim in inner.put else None
        read = list(inner.take[dim]) if dim in inner.take else None
        wants = list(outer.take[dim]) if dim in outer.take else None
        to = list(outer.put[dim]) if dim in outer.put else None
        if wants is None:
            # the outer piece reads everything that was written, in place
            if read is not None:
                take[dim] = read
            target = wrote if wrote is not None else None
            if to is not None:
                target = [to[i] for i in wrote] if wrote is not None else to
            if target is not None:
                put[dim] = target
            continue
        places = {i: k for k, i in enumerate(wrote)} if wrote is not None else None
        found = [(k, i if places is None else places.get(i)) for k, i in enumerate(wants)]
        kept = [(k, i) for k, i in found if i is not None]
        if not kept:
            return None
        take[dim] = [read[j] if read is not None else j for _, j in kept]
        if to is not None:
            put[dim] = [to[k] for k, _ in kept]
        elif len(kept) < len(wants):
            put[dim] = [k for k, _ in kept]
    keys = {*inner.scale, *outer.scale}
    scale = {key: inner.scale.get(key, 1.0) * outer.scale.get(key, 1.0) for key in keys}
    return Piece(inner.source, take, put, scale)
