"""Numbers at the borders: what is not finite, tiny rates, zero norms."""

import numpy as np
import pytest
import torch
from reference import lars_oracle, peers

from hvd_lars import LARS
from hvd_lars.optim.ratios import KeptConstants, trust_ratios

KERNELS = ("native", "fused", "eager", "elsewhere", "gpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("zero_norm", ["unit", "skip", "coast"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_norm_that_is_not_finite_is_never_a_step_of_another_size(
    kernel, zero_norm, bad, take_kernel
):
    """λ was 1 then, and the rest of the layer moved a thousand times too far."""
    weight = torch.nn.Parameter(torch.ones(5, 4))
    other = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = LARS([weight, other], lr=0.5, zero_norm=zero_norm, kernel=take_kernel(kernel))
    weight.grad, other.grad = torch.ones(5, 4), torch.ones(5, 4)
    weight.grad[2, 1] = bad
    optimizer.step()
    assert not weight.isfinite().any()
    wanted = 1 - 0.5 * 0.001
    assert other.detach().numpy() == pytest.approx(np.full((5, 4), wanted), rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_a_loss_scale_it_is_left_out(kernel, take_kernel):
    weight = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = LARS([weight], lr=0.5, kernel=take_kernel(kernel))
    weight.grad = torch.full((5, 4), torch.nan)
    optimizer.step(loss_scale=4.0)
    assert optimizer.report.skipped
    assert torch.equal(weight.detach(), torch.ones(5, 4))


@pytest.mark.parametrize("kernel", KERNELS)
def test_at_a_zero_norm_a_layer_stays_coasts_or_takes_the_plain_rate(kernel, take_kernel):
    weights = {}
    for zero_norm in ("unit", "skip", "coast"):
        weight = torch.nn.Parameter(torch.ones(6))
        options = {"zero_norm": zero_norm, "kernel": take_kernel(kernel), "weight_decay": 0.5}
        optimizer = LARS([weight], lr=1.0, momentum=0.5, trust_coefficient=0.1, **options)
        weight.grad = torch.ones(6)
        optimizer.step()
        moved = weight.detach().clone()
        weight.grad = torch.zeros(6)
        optimizer.step()
        weights[zero_norm] = moved, weight.detach().clone()
    first = 1 - 0.1 / 1.5 * 1.5  # γλ(g + βw), λ = l‖w‖ / (‖g‖ + β‖w‖)
    for moved, _ in weights.values():
        assert moved.tolist() == pytest.approx([first] * 6)
    v = 0.5 * 0.1
    assert weights["skip"][1].tolist() == pytest.approx([first] * 6)
    assert weights["coast"][1].tolist() == pytest.approx([first - v] * 6)
    assert weights["unit"][1].tolist() == pytest.approx([first - v - 0.5 * first] * 6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_at_a_zero_norm_coasting_is_apexs(kernel, clip, take_kernel):
    """A layer that starts at zero, and one that has no gradient for some steps."""
    ends = []
    for make in (
        lambda params: peers.LarcSgd(params, 0.4, 0.9, 0.05, 0.02, clip, 1e-8),
        lambda params: LARS(
            params, 0.4, 0.9, 0.05, 0.02, 1e-8, lr_position="update", trust_clip=clip,
            zero_norm="coast", kernel=take_kernel(kernel),
        ),
    ):  # fmt: skip
        params = [torch.nn.Parameter(torch.full((6,), start)) for start in (0.0, 1.0)]
        optimizer = make(params)
        for step in range(6):
            params[0].grad = torch.linspace(0.1, 1.0, 6)
            params[1].grad = torch.linspace(-1.0, 1.0, 6) * (step not in (2, 3))
            optimizer.step()
        ends.append(torch.cat([param.detach() for param in params]))
    assert ends[1].tolist() == pytest.approx(ends[0].tolist(), rel=1e-5)


def test_a_zero_norm_is_not_clipped():
    group = {
        "denominator": "separate", "weight_decay": 0.0, "eps": 0.0, "trust_coefficient": 0.1,
        "trust_clip": True, "lr": 4.0, "zero_norm": "unit",
    }  # fmt: skip
    norms = torch.tensor([1.0, 0.0, 50.0]).double(), torch.tensor([1.0, 1.0, 1.0]).double()
    group_of = torch.zeros(3, dtype=torch.int64)
    found = trust_ratios([group], group_of, *norms, KeptConstants().of([group], group_of))
    assert found.tolist() == pytest.approx([0.1 / 4.0, 1.0, 1.0])


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("how", ["new", "loaded"])
@pytest.mark.parametrize("kernel", ["native", "fused", "eager"])
def test_tiny_rates_lose_no_digits(kernel, how, size):
    """The fold of the fused kernel lost them as 1e-16 / γλ."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(7, 5))]
    gradients = [[generator.normal(size=(7, 5))] for _ in range(4)]
    rates = [size / 1e-3, 2 * size / 1e-3, 0.5 * size / 1e-3, size / 1e-3]
    options = lars_oracle.Options(weight_decay=0.0)
    wanted, momentum = lars_oracle.run(weights, gradients, rates, options)
    param = torch.nn.Parameter(torch.from_numpy(weights[0].copy()))
    optimizer = LARS([param], kernel=kernel)
    for i, (grads, rate) in enumerate(zip(gradients, rates, strict=True)):
        if how == "loaded" and i == 2:
            state = optimizer.state_dict()
            optimizer = LARS([param], kernel=kernel)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = rate
        param.grad = torch.from_numpy(grads[0])
        optimizer.step()
    found = optimizer.momentum(param).numpy()
    assert np.linalg.norm(found - momentum[0]) < 1e-14 * np.linalg.norm(momentum[0])
    moved = param.detach().numpy() - weights[0]
    assert np.linalg.norm(moved - (wanted[0] - weights[0])) < 1e-14 * np.linalg.norm(weights[0])
