import math

import pytest
import torch
from torch import nn

from efftrain_ds.methods.autoprog.scores import (
    competition_ranks,
    gram,
    gram_score,
    ntk_score,
    per_sample_gradients,
    score_module,
    vote,
    zico_score,
)


class Net(nn.Module):
    """Convolution, norm, dropout and two linear layers on [N, 1, 4, 4]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 2, stride=2)
        self.norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(24, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc1(self.drop(self.norm(self.stem(x).flatten(1))))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batches(count, n=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for _ in range(count)
    ]


# Vote


def test_vote_oracle():
    result = vote([1, 1.5, 2, 3], [-50, -10, -20, -5], [10, 30, 20, 40])
    assert result.votes == (5, 4, 6, 5)
    assert result.index == 1


def test_vote_tie_takes_the_faster():
    result = vote([2, 1], [-1, -2], [3, 2])
    assert result.votes == (3, 3)
    assert result.index == 1


def test_competition_ranks():
    assert competition_ranks([3, 1, 1, 2], descending=False) == (4, 1, 1, 3)
    assert competition_ranks([3, 1, 1, 2], descending=True) == (1, 3, 3, 2)
    assert competition_ranks([1.0, 1.0 + 5e-7, 1.0 + 5e-6], descending=False) == (1, 1, 3)
    assert competition_ranks([-1e12, -1e12 - 1, -2e12], descending=True) == (1, 1, 3)  # relative where values are large
    assert competition_ranks([-math.inf, -5, math.nan, -math.inf], descending=True) == (2, 1, 2, 2)


# Tangent kernel


def test_ntk_score_of_known_kernels():
    assert ntk_score(torch.diag(torch.tensor([1.0, 2.0, 3.0]))) == pytest.approx(-9)
    assert ntk_score(torch.ones(2, 5)) == pytest.approx(-1e12)  # rank 1: the floor keeps it finite and negative
    assert gram_score(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) == pytest.approx(-1e12)  # negative eigenvalue
    assert ntk_score(torch.zeros(2, 3)) == -math.inf
    assert ntk_score(torch.tensor([[1.0, math.nan], [0.0, 1.0]])) == -math.inf


def test_gram_is_the_product_of_the_jacobian(net):
    images, _ = batches(1)[0]
    net.eval()
    names = [n for n, _ in net.named_parameters()]
    rows = per_sample_gradients(net, images, names)
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert torch.allclose(gram(rows), jacobian.double() @ jacobian.double().T, rtol=1e-12)
    assert gram_score(gram(rows)) == pytest.approx(ntk_score(jacobian), rel=1e-6)
    # the samples' gradients add up to the gradient of the whole batch
    net(images).sum().backward()
    whole = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert torch.allclose(jacobian.sum(0), whole, atol=1e-5)


def test_per_sample_gradients_of_unused_tensors_are_zero(net):
    net.spare = nn.Linear(2, 2)
    rows = per_sample_gradients(net.eval(), batches(1)[0][0], ["spare.weight", "head.bias"])
    assert [g.tolist() for g in rows[0]] == [[[0, 0], [0, 0]], [1, 1, 1]]


# ZiCo


def test_zico_by_hand():
    # entries: |mean| 2 and std 1; equal over batches (left out)
    layer = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert zico_score([layer]) == pytest.approx(math.log(2))
    signs = torch.tensor([[-1.0], [3.0]])  # mean of |g| 2, population std 2
    assert zico_score([layer, signs]) == pytest.approx(math.log(2) + math.log(1))


def test_zico_skips_layers_without_spread():
    same = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).expand(3, 7)
    assert zico_score([same]) == 0
    layer = torch.tensor([[1.0], [3.0]])
    assert zico_score([same, layer]) == zico_score([layer])
    assert zico_score([layer, 100 * layer]) == pytest.approx(2 * zico_score([layer]))  # no scale of the gradients


# Both on a module


def test_score_module_by_hand(net):
    data = batches(4)
    trainable = {"fc1.weight", "fc1.bias", "norm.weight"}
    ntk, zico = score_module(net, data, trainable)
    net.eval()
    weights = ["norm.weight", "fc1.weight"]  # the bias is no tensor of the kernel, the norm no layer of ZiCo
    expected = [gram_score(gram(per_sample_gradients(net, images, weights))) for images, _ in data[:2]]
    assert ntk == pytest.approx(sum(expected) / 2)
    samples = []
    for images, labels in data[2:]:
        net.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        samples.append(net.fc1.weight.grad.clone())
    assert zico == pytest.approx(zico_score([torch.stack(samples)]))


def test_score_module_leaves_the_module_as_it_was(net):
    net.stem.requires_grad_(False)
    net.norm.eval()
    kept = torch.ones(3)
    net.head.bias.grad = kept
    values = [p.clone() for p in net.parameters()]
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    with torch.no_grad():  # works, and leaves no trace, inside of no_grad too
        first = score_module(net, batches(4), {"stem.weight", "head.weight"})
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [m.training for m in net.modules()] == modes
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["head.bias"]
    assert net.head.bias.grad is kept
    assert torch.equal(kept, torch.ones(3))
    assert all(torch.equal(a, b) for a, b in zip(values, net.parameters(), strict=True))
    assert score_module(net, batches(4), {"stem.weight", "head.weight"}) == first  # no dropout inside


def test_score_module_restores_after_an_error(net):
    with pytest.raises(RuntimeError):
        score_module(net, [(torch.zeros(2, 5, 4, 4), torch.zeros(2, dtype=torch.int64))] * 4, {"head.weight"})
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


def test_more_layers_score_higher_in_zico(net):
    data = batches(4)
    few = score_module(net, data, {"fc1.weight"})[1]
    assert score_module(net, data, {"fc1.weight", "head.weight", "stem.weight"})[1] > few


def test_score_module_refusals(net):
    with pytest.raises(ValueError, match=r"2 \+ 2 scoring batches needed, found 3"):
        score_module(net, batches(3), {"head.weight"})
    with pytest.raises(ValueError, match=r"no parameter 'neck\.weight'"):
        score_module(net, batches(4), {"neck.weight"})
    ntk, zico = score_module(net, batches(4), {"head.bias"})
    assert (ntk, zico) == (-math.inf, 0)


def test_score_module_on_a_vit_with_frozen_blocks():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3
    )
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2])) for _ in range(4)]
    names = [n for n, _ in model.named_parameters()]
    part = score_module(model, data, {n for n in names if not n.startswith("blocks.1.")})
    whole = score_module(model, data, set(names))
    assert -1e12 <= part[0] <= -1
    assert -1e12 <= whole[0] <= -1
    assert whole[1] > part[1]  # the layers of one more block
    assert all(p.grad is None for p in model.parameters())
