"""The parts of the guard that need no second rank."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from efftrain_ds.core.batch import Batch
from efftrain_ds.core.errors import DesyncError
from efftrain_ds.guards import replay as replay_module
from efftrain_ds.guards import vote
from efftrain_ds.guards.buffers import BufferKeeper
from efftrain_ds.guards.nonfinite import Micro, Watch
from efftrain_ds.guards.replay import read_replay, set_rng, write_replay
from efftrain_ds.zero.skip import sum_is_finite

CPU = torch.device("cpu")


def test_vote_of_one_rank():
    found = vote.vote(CPU, nonfinite=torch.tensor(True), stop=False, digest=2**62 - 1)
    assert found == vote.Ballot(True, False, True)
    assert vote.vote(CPU, stop=True) == vote.Ballot(False, True, True)
    digests = {vote.digest_of(text) for text in ("a", "b", "a\nb", "")}
    assert len(digests) == 4
    assert all(0 <= d < 2**62 for d in digests)


def test_what_differs_is_named(monkeypatch):
    others = [{"stage": "1", "mask": "x" * 400}, {"stage": "2", "mask": "x" * 400}, {"stage": "1", "extra": "e"}]
    monkeypatch.setattr(vote, "gather", lambda own: others)
    with pytest.raises(DesyncError, match=r"step 7: .*extra \(rank 0, 1: none; rank 2: e\)") as caught:
        vote.compare(others[0], 7)
    assert "stage (rank 0, 2: 1; rank 1: 2)" in str(caught.value)
    assert "mask (rank 0, 1: xxx" in str(caught.value)
    assert len(str(caught.value)) < 800


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return self.second(self.first(x)).sum() * self.scale


def poisoned(net, out_of, value):
    """Lets `value` into the gradient behind one layer's output."""
    return out_of.register_forward_hook(lambda m, i, out: out.register_hook(lambda g: g * value) and None)


def test_first_bad_parameter_in_backward_order():
    net = Net()
    watch = Watch(net, CPU, gradients=True)
    assert "frozen" not in watch.names
    x = torch.randn(5, 3)
    for row in range(3):
        handle = poisoned(net, net.first, float("inf")) if row == 1 else None
        watch.micro.note(Batch(x, ids=torch.arange(4) + 10 * row))
        loss = net(x)
        loss.backward()
        watch.advance(loss)
        if handle is not None:
            handle.remove()
    assert bool(watch.flag())
    found, rows = watch.finding(3)
    assert rows == [1]
    assert found.rank == 3
    assert found.what in ("gradient of first.weight", "gradient of first.bias")
    assert found.value in ("inf", "-inf", "nan")
    assert found.ids == [10, 11, 12, 13]
    assert len(found.losses) == 3
    watch.clear()
    loss = net(x)
    loss.backward()
    watch.advance(loss)
    assert not bool(watch.flag())
    assert watch.finding(0)[0].what == ""


def test_a_bad_loss_is_named_before_the_gradients_it_makes():
    net = Net()
    watch = Watch(net, CPU, gradients=True)
    loss = net(torch.full((2, 3), float("nan")))
    loss.backward()
    watch.advance(loss)
    found, _ = watch.finding(0)
    assert (found.what, found.value) == ("loss", "nan")


def test_large_finite_gradients_are_no_fault_and_low_precision_is_summed_in_fp32():
    net = Net().to(torch.float16)
    watch = Watch(net, CPU, gradients=True)
    loss = (net.unused * torch.tensor([60000.0, 60000.0], dtype=torch.float16)).float().sum() * 0 + net.scale.float()
    (net.unused.float() * 60000.0).sum().backward()
    watch.advance(loss)
    assert not bool(watch.flag())


def test_hooks_are_taken_off_and_gradients_unchanged():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 3)
    net(x).backward()
    plain = [p.grad.clone() for p in net.first.parameters()]
    net.zero_grad()
    watch = Watch(net, CPU, gradients=True)
    net(x).backward()
    assert watch.pending
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, net.first.parameters(), strict=True))
    watch.advance()
    watch.close()
    net(x).backward()
    assert not watch.pending


def test_good_micro_batches_let_their_images_go():
    net = Net()
    watch = Watch(net, CPU, gradients=True)
    for value in (1.0, float("nan"), 1.0):
        images = torch.full((2, 3), value)
        watch.micro.tensors["images"] = images
        loss = net(images)
        loss.backward()
        watch.advance(loss)
    assert ["images" in micro.tensors for micro in watch.micros] == [False, True, False]


def test_buffers_come_back():
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    norm.register_buffer("constant", torch.arange(3))
    norm.register_buffer("replaced", torch.zeros(2))
    keeper = BufferKeeper(norm)
    norm(torch.randn(4, 3))
    keeper.save()
    before = {n: b.clone() for n, b in norm.named_buffers()}
    norm(torch.full((4, 3), float("nan")))
    norm.replaced = torch.ones(2)
    assert norm[0].running_mean.isnan().all()
    keeper.restore()
    assert all(torch.equal(before[n], b) for n, b in norm.named_buffers())
    norm(torch.randn(4, 3))
    keeper.save()
    assert not torch.equal(before["0.running_mean"], norm[0].running_mean)
    now = norm[0].running_mean.clone()
    keeper.restore()
    assert torch.equal(now, norm[0].running_mean)


def test_replay_file(tmp_path):
    torch.manual_seed(5)
    state, drawn = torch.get_rng_state(), torch.rand(3)
    micro = Micro({"images": torch.randn(2, 3), "ids": torch.tensor([4, 9]), "rng": state}, {"lam": 0.5})
    path = write_replay(tmp_path / "faults", 12, 1, [(3, micro)], {"found": "loss", "losses": ["nan"]})
    assert path is not None
    assert path.name == "step-00000012.rank1.json"
    found = read_replay(path)
    assert found.info["found"] == "loss"
    assert found.info["micro_batches"] == [{"index": 3, "lam": 0.5}]
    assert torch.equal(found.micros[0]["images"], micro.tensors["images"])
    set_rng(found.micros[0])
    assert torch.equal(torch.rand(3), drawn)
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))


def test_replay_files_are_few_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_module, "MAX_FILES", 2)
    monkeypatch.setattr(replay_module, "MAX_BYTES", 100)
    micro = Micro({"labels": torch.zeros(4), "images": torch.zeros(400)})
    written = [write_replay(tmp_path, step, 0, [(0, micro)], {}) for step in range(4)]
    assert [path is not None for path in written] == [True, True, False, False]
    found = read_replay(written[0])
    assert sorted(found.micros[0]) == ["labels"]
    assert found.info["micro_batches"][0]["left_out"] == ["images"]


def test_a_replay_file_that_cannot_be_written_is_no_crash(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert write_replay(tmp_path / "file" / "faults", 1, 0, [], {}) is None
    assert "no replay file of step 1" in caplog.text


def test_one_pass_over_gradients():
    grads = [torch.ones(3), torch.full((2, 2), 1e30), torch.ones(1, dtype=torch.bfloat16)]
    assert bool(sum_is_finite(grads))
    grads[1][0, 1] = float("-inf")
    assert not bool(sum_is_finite(grads))
