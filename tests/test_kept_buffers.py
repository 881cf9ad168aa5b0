"""Buffers and averages of kept and of skipped steps, with buffers of every kind."""

import torch
from torch import nn

from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.train.kept_buffers import KeptBuffers

KEPT, SKIPPED = torch.tensor(True), torch.tensor(False)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(3, 2))
        self.register_buffer("turned", torch.zeros(2, 3).t())  # not contiguous
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("places", torch.arange(3).expand(4, 3))  # shares memory


def changed(model):
    with torch.no_grad():
        model.weight += 1
    model.mean += 2.5
    model.turned += torch.arange(6.0).view(3, 2)
    model.count += 1
    model.mask[1] = True


def test_buffers_are_restored_where_a_step_is_skipped():
    model = Several()
    buffers = KeptBuffers(model)
    for kept, wanted in ((SKIPPED, 0), (KEPT, 1), (SKIPPED, 1)):
        buffers.note()
        changed(model)
        buffers.restore_unless(kept)
        assert model.mean.unique().tolist() == [2.5 * wanted]
        assert model.turned.equal(torch.arange(6.0).view(3, 2) * wanted)
        assert (model.count.item(), model.mask.sum().item()) == (wanted, wanted)
    KeptBuffers(nn.Linear(2, 2)).note()  # a model without buffers


class Replacing(Several):
    """A network whose forward assigns new tensors to its buffers."""

    def forward(self, value):
        self.mean = 0.5 * self.mean + value
        self.count = self.count + 1


def test_buffers_that_a_step_replaces_are_restored_too():
    model = Replacing()
    buffers = KeptBuffers(model)
    for kept, value, wanted in ((KEPT, 4.0, 4.0), (SKIPPED, torch.nan, 4.0), (KEPT, 1.0, 3.0)):
        buffers.note()
        model(value)
        buffers.restore_unless(kept)
        assert model.mean.unique().tolist() == [wanted]
    assert model.count == 2
    assert model.mask.tolist() == [False] * 4


def test_a_buffer_of_several_modules_stays_one():
    model, other = Replacing(), nn.Module()
    model.other = other
    other.register_buffer("mask", model.mask)
    buffers, mask = KeptBuffers(model), model.mask
    for _ in range(2):
        buffers.note()
        model(1.0)
        model.mask[2] = True
        buffers.restore_unless(SKIPPED)
    assert model.mask is mask
    assert other.mask is mask
    assert not mask.any()


def test_complex_buffers_keep_their_imaginary_part():
    model = Several()
    model.register_buffer("turns", torch.tensor([1 + 2j, 0.5j]))
    average = MovingAverage(model, 0.75)
    average.follow(model, KEPT)
    model.turns += 4j
    average.follow(model, KEPT)
    torch.testing.assert_close(average.module.turns, torch.tensor([1 + 3j, 1.5j]))


def test_the_average_follows_kept_steps_alone():
    model = Several()
    average = MovingAverage(model, 0.75)
    wanted = None
    for kept in (SKIPPED, KEPT, SKIPPED, KEPT, KEPT):
        changed(model)
        average.follow(model, kept)
        value = model.weight.detach().clone()
        if kept:
            wanted = value if wanted is None else 0.75 * wanted + 0.25 * value
        found = average.module.weight
        torch.testing.assert_close(found, torch.ones_like(found) if wanted is None else wanted)
    assert average.n_averaged == 3
    assert average.module.mask.tolist() == [False, True, False, False]
    assert average.module.count == 2  # 2, then 2.5 and 3.125 rounded down, as torch's would be
