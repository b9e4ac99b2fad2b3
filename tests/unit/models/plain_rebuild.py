"""Carries out a RebuildRequest on a plain module, without DeepSpeed: the meaning of a request, in a few lines."""

import copy

import torch
from torch import nn

from efftrain_ds.core.rng import torch_rng


def blueprint_of(model):
    """Deep copy with parameters on the meta device."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def values_of(model):
    """Clones of all parameters and buffers by name, shared ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def materialised(blueprint):
    memo = {id(p): nn.Parameter(torch.full(p.shape, torch.nan), p.requires_grad) for p in blueprint.parameters()}
    return copy.deepcopy(blueprint, memo)


def mapped(request, shapes, old, seed=0):
    """New values by name, from old values by name."""
    new, used = {}, set()
    for name, shape in shapes.items():
        target = request.maps.get(name)
        if target is None:
            assert old[name].shape == shape, name
            new[name] = old[name].clone()
            used.add(name)
        elif target.pieces:
            (piece,) = target.pieces
            assert piece.whole
            assert old[piece.source].shape == shape, name
            new[name] = old[piece.source].clone()
            used.add(piece.source)
        elif target.init is not None:
            new[name] = target.init(shape, torch_rng("cpu", seed, name))
            assert new[name].shape == shape
        else:
            new[name] = torch.zeros(shape)
    assert not set(request.maps) - set(shapes), "maps name tensors that are not in the new model"
    assert set(old) - used == set(request.drops), "old tensors that nothing takes and that are not dropped"
    return new


def rebuild(model, request, average=None, seed=0):
    """(new model, its mapped average); `average` holds values by name, as `values_of` returns them."""
    blueprint = request.surgery(blueprint_of(model))
    result = materialised(blueprint)
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    online, average = values_of(model), average if average is not None else values_of(model)
    new_average = mapped(request, shapes, average, seed)
    new = new_average if request.values == "ema" else mapped(request, shapes, online, seed)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(new[name])
    return result.train(model.training), new_average


def perturb(model, seed=1, scale=0.1):
    """Add noise to every parameter, so that no block is close to an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model
