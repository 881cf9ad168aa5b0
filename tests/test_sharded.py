"""A sharded step is a replicated step is one device's."""

import pytest
import torch
from tiny import RATES, TinySource, assert_same_parameters, one_device, tiny_model, tiny_trainer
from torch import nn
from torch.nn import functional

from hvd_lars.optim import LARS, Replicated, Sharded, parameter_groups
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import verify_agreement
from hvd_lars.state.run_state import RunState

pytestmark = pytest.mark.ranks(1, 2, 3, 5, mpi=(4,))
FEW = pytest.mark.ranks(1, 2, 3, mpi=(4,))  # elsewhere it takes minutes

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
OPTIONS = [
    {},
    {"denominator": "combined"},
    {"lr_position": "update", "nesterov": True},
    {"adapt": "layer", "zero_norm": "skip"},
    {"adapt": "all", "trust_clip": True, "eps": 1e-5},
    {"adapt": "none", "momentum": 0.0},
    {"kernel": "fused"},
    {"kernel": "eager", "nesterov": True},
]


def train(trainer):
    for step in range(len(RATES)):
        trainer.train_step(trainer.feed.from_step(step))
    return trainer


@pytest.mark.parametrize(
    ("dtype", "micro_batch"), [pytest.param(torch.float32, 59, marks=FEW), (torch.float64, 3)]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sharded_equals_replicated_and_one_device(comm, dtype, micro_batch, options):
    sharded = train(tiny_trainer(comm, dtype, micro_batch, placed=Sharded, **options))
    replicated = train(tiny_trainer(comm, dtype, micro_batch, **options))
    reference, optimizer = one_device(dtype, **options)
    verify_agreement(sharded.state.tensors(), comm)
    assert_same_parameters(sharded.model, reference, TOLERANCE[dtype])
    assert_same_parameters(sharded.model, replicated.model, TOLERANCE[dtype])
    found = sharded.state.tensors()
    wanted = RunState(reference, optimizer).tensors()
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].norm() + 1e-30
        assert (found[name] - wanted[name]).norm() / scale < 30 * TOLERANCE[dtype], name


def test_a_rank_holds_its_share_of_the_momentum(comm):
    trainer = train(tiny_trainer(comm, torch.float32, 59, placed=Sharded))
    state = trainer.optimizer.state
    mine = sum(state[p]["momentum_buffer"].numel() for p in trainer.model.parameters())
    total = sum(p.numel() for p in trainer.model.parameters())
    assert abs(mine - total / comm.size) <= 4 * comm.size  # buckets are padded
    held = torch.tensor(float(mine))
    comm.start_all_reduce_sum(held, "held").wait()
    assert held.item() == total


def test_the_same_ranks_end_with_the_same_bits_every_time(comm):
    ends = [train(tiny_trainer(comm, torch.float32, 7, placed=Sharded)) for _ in range(3)]
    weights = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in ends]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("saved", [Sharded, Replicated])
def test_a_checkpoint_serves_both_placements(comm, saved, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float64, 16, placed=saved)
    for step in range(3):
        trainer.train_step(trainer.feed.from_step(step))
    checkpointer = Checkpointer(folder, comm)
    trainer.state.restored(Progress(step=3))
    checkpointer.save(trainer.state)
    for step in range(3, 8):
        trainer.train_step(trainer.feed.from_step(step))
    for placed in (Sharded, Replicated):
        other = tiny_trainer(comm, torch.float64, 16, seed=1 + comm.rank, placed=placed)
        checkpointer.restore(other.state)
        assert other.state.progress.step == 3
        for step in range(3, 8):
            other.train_step(other.feed.from_step(step))
        assert_same_parameters(other.model, trainer.model, 1e-13)
        if placed is saved:
            for a, b in zip(other.model.parameters(), trainer.model.parameters(), strict=True):
                assert torch.equal(a, b)


def test_channels_last_layers_keep_their_layout_across_borders(comm):
    model = tiny_model(torch.float64).to(memory_format=torch.channels_last)
    reference = tiny_model(torch.float64)
    strides = [param.stride() for param in model.parameters()]
    placement = Sharded(model.parameters(), comm, bucket_bytes=700)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=1.0, placement=placement)
    plain = LARS(parameter_groups(reference, 5e-3), lr=1.0)
    for step in range(4):
        images = torch.full((2, 3, 6, 6), 1.0 + step, dtype=torch.float64)
        images[0, 1] = 0.5
        optimizer.zero_grad()
        if comm.rank == step % comm.size:  # the others join in the step
            model(images).square().sum().backward()
        optimizer.step()
        assert all(param.grad is None for param in model.parameters())
        plain.zero_grad()
        reference(images).square().sum().backward()
        plain.step()
    assert [param.stride() for param in model.parameters()] == strides
    assert_same_parameters(model, reference, 1e-12)
    for param, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(optimizer.momentum(param), plain.momentum(other))


def test_the_graph_of_an_old_forward_pass_is_refused(comm):
    model = tiny_model(torch.float64)
    optimizer = LARS(model.parameters(), placement=Sharded(model.parameters(), comm))
    images = torch.ones(2, 3, 6, 6, dtype=torch.float64)
    loss = model(images).sum()
    model(images).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_outside_the_placement_is_refused(comm):
    model = tiny_model(torch.float32)
    placement = Sharded(model[0].parameters(), comm)
    with pytest.raises(ValueError, match="not in its placement"):
        LARS(model.parameters(), placement=placement)


class LateGathering:
    """A communicator whose gathered parameters are NaN until somebody waits for them."""

    def __init__(self, comm):
        self._comm, self.waiting = comm, 0

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_all_gather(self, flat, name):
        whole = flat.clone()
        pending = self._comm.start_all_gather(whole, name)
        part = len(flat) // self._comm.size
        flat[: self._comm.rank * part] = flat[(self._comm.rank + 1) * part :] = torch.nan
        self.waiting += 1
        return LateGathering.Late(self, pending, flat, whole)

    class Late:
        def __init__(self, outer, pending, flat, whole):
            self._outer, self._pending, self._flat, self._whole = outer, pending, flat, whole

        def wait(self):
            self._pending.wait()
            with torch.no_grad():
                self._flat.copy_(self._whole)
            self._outer.waiting -= 1


class Attentive(nn.Module):
    """Reads parameters of modules that it does not call, and has one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(108, 12), nn.Tanh())
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.tied = nn.Linear(12, 5)  # not called
        self.scale = nn.Parameter(torch.ones(5))
        self.unused = nn.Linear(3, 3)

    def forward(self, images):
        tokens = self.first(images).reshape(len(images), 3, 4)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return functional.linear(mixed.flatten(1), self.tied.weight, self.tied.bias) * self.scale


@pytest.mark.parametrize("make", [tiny_model, lambda dtype: Attentive().to(dtype)])
def test_parameters_may_arrive_during_the_next_forward(comm, make):
    source, ends, open_after = TinySource(torch.float64), [], []
    for late in (False, True):
        torch.manual_seed(0)
        model = make(torch.float64)
        ranks = LateGathering(comm) if late else comm
        placement = Sharded(model.parameters(), ranks, bucket_bytes=700)
        if late:
            placement.gather_during_forward(model)
        optimizer = LARS(parameter_groups(model, 5e-3), lr=2.0, placement=placement)
        for step in range(5):
            optimizer.zero_grad()
            mine = torch.arange(step * 20, step * 20 + 20)[comm.rank :: comm.size]
            images, labels = source.images[mine], source.labels[mine]
            (functional.cross_entropy(model(images), labels, reduction="sum") / 20).backward()
            optimizer.step()
            if late:
                open_after.append(ranks.waiting)
        placement.complete_parameters()
        ends.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert open_after == [len(placement.gradients.buckets)] * 5
    assert len(placement.gradients.buckets) > 2
