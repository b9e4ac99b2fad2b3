"""Maps of new tensors: composition against plain indexing, index maps, and what cannot be composed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from efftrain_ds.core.errors import RebuildError
from efftrain_ds.zero import request as rq
from efftrain_ds.zero.exchange import mapped_values


def _numpy(target: rq.ParameterMap, shape, sources, key: str) -> np.ndarray:
    """A map written with numpy's own indexing."""
    result = np.zeros(shape, dtype=np.float32)
    for piece in target.pieces:
        if piece.source not in sources:
            continue
        old = sources[piece.source]
        take = np.ix_(*[np.asarray(piece.take.get(d, range(n)), dtype=int) for d, n in enumerate(old.shape)])
        put = np.ix_(*[np.asarray(piece.put.get(d, range(n)), dtype=int) for d, n in enumerate(shape)])
        result[put] = old[take] * np.float32(piece.scale.get(key, 1.0))
    return result


def _random_map(rng, names, shapes, shape) -> rq.ParameterMap:
    """Up to three disjoint pieces (cut along one dimension) with random index sets."""
    cut = int(rng.integers(len(shape)))
    places = rng.permutation(shape[cut])
    count = int(rng.integers(1, 4))
    edges = sorted(rng.integers(0, shape[cut] + 1, size=count - 1).tolist())
    pieces = []
    for part in np.split(places, edges):
        source = names[int(rng.integers(len(names)))]
        take, put = {}, {}
        for dim, (have, want) in enumerate(zip(shapes[source], shape, strict=True)):
            if dim == cut:
                put[dim] = part.tolist()
                take[dim] = rng.integers(0, have, size=len(part)).tolist()
            elif have != want or rng.random() < 0.5:
                take[dim] = rng.integers(0, have, size=want).tolist()
        pieces.append(rq.Piece(source, take, put, {"fp32": float(2.0 ** rng.integers(-2, 3)), "exp_avg": 0.5}))
    if rng.random() < 0.3 and any(shapes[n] == shape for n in names):
        pieces = [rq.Piece(next(n for n in names if shapes[n] == shape))]
    return rq.ParameterMap(tuple(pieces))


@pytest.mark.parametrize("seed", range(60))
def test_composition_is_the_one_after_the_other(seed):
    rng = np.random.default_rng(seed)
    old = {n: tuple(rng.integers(1, 6, size=2).tolist()) for n in "abc"}
    middle = {n: tuple(rng.integers(1, 6, size=2).tolist()) for n in ("b", "c", "d")}
    middle["a"] = old["a"]  # no map: it stays
    new = {n: tuple(rng.integers(1, 6, size=2).tolist()) for n in ("e", "f")}
    first = rq.RebuildRequest(maps={n: _random_map(rng, list(old), old, middle[n]) for n in ("b", "c", "d")})
    second = rq.RebuildRequest(maps={n: _random_map(rng, list(middle), middle, new[n]) for n in new})
    composed = rq.compose_requests(first, second)
    values = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in old.items()}
    for key in ("fp32", "exp_avg", "ema"):
        scale_key = "fp32" if key == "ema" else key
        between = {n: _numpy(m, middle[n], values, scale_key) for n, m in first.maps.items()}
        between["a"] = values["a"]
        for name, shape in new.items():
            expected = _numpy(second.maps[name], shape, between, scale_key)
            tensors = {n: torch.from_numpy(v) for n, v in values.items()}
            found = mapped_values(key, composed.maps[name], torch.Size(shape), tensors, None)
            assert np.array_equal(found.numpy(), expected), (key, name)


def test_drops_are_those_of_the_old_module():
    first = rq.RebuildRequest(maps={"x.1": rq.copy("x.2"), "x.2": rq.copy("x.3")}, drops=frozenset({"x.1"}))
    second = rq.RebuildRequest(drops=frozenset({"x.2"}))
    composed = rq.compose_requests(first, second)
    assert composed.drops == {"x.1", "x.3"}  # x.2 between the two requests was x.3 before them
    assert set(composed.maps) == {"x.1"}


def test_initial_values_keep_the_name_they_were_drawn_under():
    def ones(shape, generator):
        return torch.ones(shape)

    first = rq.RebuildRequest(maps={"new": rq.fresh(ones)})
    second = rq.RebuildRequest(maps={"renamed": rq.copy("new")})
    third = rq.RebuildRequest(maps={"again": rq.copy("renamed")})
    target = rq.compose_requests(rq.compose_requests(first, second), third).maps["again"]
    assert isinstance(target.init, rq.DrawnAs)
    assert target.init.name == "new"
    assert not target.moments
    assert target.pieces == ()
    assert target.init(torch.Size([2]), torch.Generator()).tolist() == [1, 1]


def test_what_one_map_cannot_say_is_refused():
    def ones(shape, generator):
        return torch.ones(shape)

    first = rq.RebuildRequest(
        maps={
            "drawn": rq.fresh(ones),
            "hollow": rq.ParameterMap((rq.Piece("a", put={0: [0]}),)),
            "young": rq.ParameterMap((rq.Piece("a"),), moments=False),
        }
    )

    def second(target):
        return rq.compose_requests(first, rq.RebuildRequest(maps={"t": target}))

    with pytest.raises(RebuildError, match="t: a part of drawn"):
        second(rq.gather("drawn", {0: [0]}))
    with pytest.raises(RebuildError, match="t: hollow.* goes over other values"):
        second(rq.ParameterMap((rq.Piece("a"), rq.Piece("hollow"))))
    with pytest.raises(RebuildError, match="whose state an earlier request"):
        second(rq.ParameterMap((rq.Piece("a", put={0: [0]}), rq.Piece("young", put={0: [1]}))))
    assert second(rq.gather("hollow", {0: [1, 0]})).maps["t"].pieces[0].put == {0: [1]}


def test_flags_and_surgeries_are_joined():
    calls = []

    def surgery(number):
        return lambda model: (calls.append(number), model)[1]

    first = rq.RebuildRequest(surgery(1), values="ema", reason="a")
    second = rq.RebuildRequest(surgery(2), reset=True, reason="b")
    both = rq.compose_requests(first, second)
    both.surgery(nn.Identity())
    assert calls == [1, 2]
    assert (both.values, both.reset, both.reason) == ("ema", True, "a; b")


def test_table_says_where_values_come_from():
    request = rq.RebuildRequest(
        maps={
            "w": rq.ParameterMap((rq.Piece("v", {0: [1, 2]}, {0: [0, 1]}, {"fp32": 0.5}),), torch.ones, moments=False),
            "z": rq.zeros(),
        },
        drops=frozenset({"u"}),
    )
    lines = request.table()
    assert lines[0].startswith("w <- v[dim 0: 2 indices] into [dim 0: 2 indices] x fp32 0.5 + fresh values elsewhere")
    assert lines[0].endswith("(new optimizer state)")
    assert lines[1:] == ["z <- zeros (new optimizer state)", "u dropped"]


def test_mapped_values():
    old = torch.arange(12.0).view(3, 4)
    target = rq.ParameterMap((rq.Piece("a", {0: [2, 0], 1: [1, 1]}, {0: [0, 3], 1: [2, 0]}, {"exp_avg": 0.5}),))
    initial = torch.full((4, 3), 9.0)
    value = mapped_values("fp32", target, torch.Size([4, 3]), {"a": old}, initial)
    expected = initial.clone()
    expected[0, 2], expected[0, 0], expected[3, 2], expected[3, 0] = 9.0, 9.0, 1.0, 1.0
    assert torch.equal(value, expected)
    moment = mapped_values("exp_avg", target, torch.Size([4, 3]), {"a": old}, initial)
    assert moment[0, 2] == 4.5
    assert moment[1].abs().sum() == 0  # initial values are no moments
    assert not mapped_values("fp32", target, torch.Size([4, 3]), {}, None).any()
    special = torch.tensor([float("nan"), -0.0])
    kept = mapped_values("fp32", rq.copy("s"), torch.Size([2]), {"s": special}, None)
    assert torch.equal(kept.view(torch.int32), special.view(torch.int32))
