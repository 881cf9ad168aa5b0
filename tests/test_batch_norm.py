"""BatchNorm over groups of ranks against one device that holds the group's samples."""

import copy

import pytest
import torch
from tiny import RATES, assert_same_parameters, one_device, tiny_trainer
from torch import nn

from hvd_lars.models.batch_norm import span_ranks

pytestmark = pytest.mark.ranks(1, 2, 3, 4)
CASES = [
    nn.BatchNorm2d(5),
    nn.BatchNorm2d(5, momentum=None),
    nn.BatchNorm2d(5, affine=False, eps=1e-3, momentum=0.3),
    nn.BatchNorm2d(5, track_running_stats=False),
    nn.BatchNorm1d(5),
]


def data(norm, count, dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(2)
    shape = (count, 5, 3, 4) if isinstance(norm, nn.BatchNorm2d) else (count, 5)
    images = torch.randn(shape, generator=generator, dtype=torch.float64) * 3.0 + offset
    return images.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_gradients_and_statistics_are_those_of_one_device(comm, case):
    for ranks in [n for n in range(1, comm.size + 1) if comm.size % n == 0]:
        torch.manual_seed(0)
        model = nn.Sequential(copy.deepcopy(CASES[case])).double()
        if model[0].affine:
            nn.init.normal_(model[0].weight)
            nn.init.normal_(model[0].bias)
        reference = copy.deepcopy(model)
        assert span_ranks(model, comm.group(ranks)) == 1
        images, weights = data(CASES[case], 7 * comm.size + 1)
        mine = torch.arange(len(images)) % comm.size == comm.rank  # uneven: 8 and 7
        first = comm.rank // ranks * ranks
        group = torch.arange(len(images)) % comm.size
        group = (group >= first) & (group < first + ranks)
        for _ in range(2):
            here = images[mine].requires_grad_()
            (model(here) * weights[mine]).sum().backward()
            there = images[group].requires_grad_()
            (reference(there) * weights[group]).sum().backward()
        torch.testing.assert_close(model(images[mine]), reference(images[group])[mine[group]])
        torch.testing.assert_close(here.grad, there.grad[mine[group]], rtol=1e-12, atol=1e-12)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, dict(reference.named_buffers())[name])
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            total = param.grad.clone()
            comm.group(ranks).start_all_reduce_sum(total, "gradient").wait()
            torch.testing.assert_close(total, other.grad, rtol=1e-11, atol=1e-11)
        model.eval()
        reference.eval()
        torch.testing.assert_close(model(images), reference(images), rtol=1e-12, atol=1e-12)


def test_an_activation_in_place_may_follow(comm):
    reference = nn.Sequential(nn.BatchNorm2d(5, affine=False), nn.ReLU()).double()
    model = nn.Sequential(nn.BatchNorm2d(5, affine=False), nn.ReLU(inplace=True)).double()
    span_ranks(model, comm.group(comm.size))
    images, scale = data(CASES[0], 4 * comm.size)
    here = images[comm.rank :: comm.size].clone().requires_grad_()
    there = images.clone().requires_grad_()
    (model(here) * scale[comm.rank :: comm.size]).sum().backward()
    (reference(there) * scale).sum().backward()
    mine = there.grad[comm.rank :: comm.size]
    torch.testing.assert_close(here.grad, mine, rtol=1e-11, atol=1e-11)


def test_a_norm_that_does_more_is_refused(comm):
    class WithActivation(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="0 is a WithActivation, not a plain BatchNorm"):
        span_ranks(nn.Sequential(WithActivation(3)), comm.group(1))


def test_a_large_mean_costs_no_precision(comm):
    """Sums about zero would lose every digit of the variance in float32."""
    model = nn.Sequential(nn.BatchNorm2d(5))
    span_ranks(model, comm.group(comm.size))
    images, _ = data(CASES[0], 8 * comm.size, torch.float32, offset=1e4)
    found = model(images[comm.rank :: comm.size])
    exact = nn.BatchNorm2d(5).double()(images.double())[comm.rank :: comm.size]
    assert (found.double() - exact).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_training_is_that_of_one_device(comm, dtype, tolerance):
    reference, _ = one_device(dtype, norm=True)
    trainer = tiny_trainer(comm, dtype, micro_batch=1000, norm=True)
    batches = trainer.feed.from_step(0)
    for _ in RATES:
        trainer.train_step(batches)
    assert_same_parameters(trainer.model, reference, tolerance)
    for (name, found), wanted in zip(
        trainer.model.named_buffers(), reference.buffers(), strict=True
    ):
        assert (found - wanted).abs().max() < tolerance * 10, name
