"""A LARS step against the written-out oracle and against other people's optimizers."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import timm.optim
import torch
from reference import lars_oracle
from reference.peers import LarcSgd, OptaxLars
from torch import nn
from torch.distributed import HashStore
from torch.distributed.fsdp import FullyShardedDataParallel

from hvd_lars import LAMB, LARS, parameter_groups

SHAPES = [(7, 3, 3, 2), (5, 11), (13,), (4, 1)]
RATES = [0.1 * 20 ** math.sin(t) for t in range(20)]  # swings over a factor of 400 …
RATES[7] = 0.0  # … and rests once


def problem(steps=20, seed=0, zero_weight=False, zero_gradient=False):
    """Weights, and gradients for every step, of layers whose norms span six decades."""
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=s) * 10.0 ** (i - 2) for i, s in enumerate(SHAPES)]
    gradients = [
        [generator.normal(size=s) * 10.0 ** (1 - i) for i, s in enumerate(SHAPES)]
        for _ in range(steps)
    ]
    if zero_weight:
        weights[1][:] = 0.0
    if zero_gradient:
        for t in (3, 4, 9):
            gradients[t][2][:] = 0.0
    return weights, gradients


def train(optimizer, params, gradients, rates):
    for grads, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad).to(param.dtype).clone()
        optimizer.step()


def as_params(weights, dtype=torch.float64):
    return [nn.Parameter(torch.from_numpy(w).to(dtype).clone()) for w in weights]


def assert_close(params, wanted, tolerance):
    for i, (param, w) in enumerate(zip(params, wanted, strict=True)):
        found = param.detach().double().numpy()
        scale = np.linalg.norm(w) or 1.0
        assert np.linalg.norm(found - w) / scale < tolerance, f"layer {i}"


COMBINATIONS = list(
    itertools.product(
        ["momentum", "update"],
        ["separate", "combined"],
        [False, True],  # trust_clip
        ["unit", "skip"],
        [(0.9, False), (0.9, True), (0.0, False)],  # momentum, nesterov
        [(0.0, 0.0), (5e-4, 1e-5)],  # weight decay, eps
    )
)


KERNELS = ["native", "fused", "eager", "elsewhere"]
CASES = list(itertools.product(KERNELS, COMBINATIONS))
CASES += [("gpu", combination) for combination in COMBINATIONS[::7]]  # its interpreter is slow


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kernel", "combination"), CASES, ids=str)
def test_every_combination_of_options_against_the_oracle(combination, kernel, dtype, take_kernel):
    position, denominator, clip, zero_norm, (momentum, nesterov), (decay, eps) = combination
    options = lars_oracle.Options(
        momentum=momentum,
        weight_decay=decay,
        trust_coefficient=0.02,
        eps=eps,
        nesterov=nesterov,
        lr_position=position,
        denominator=denominator,
        trust_clip=clip,
        zero_norm=zero_norm,
    )
    weights, gradients = problem(zero_weight=True, zero_gradient=True)
    wanted, buffers = lars_oracle.run(weights, gradients, RATES, options)
    params = as_params(weights, dtype)
    optimizer = LARS(params, **vars(options), kernel=take_kernel(kernel))
    train(optimizer, params, gradients, RATES)
    optimizer.unfold_momentum()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert_close(params, wanted, tolerance)
    if momentum:
        found = [optimizer.state[p]["momentum_buffer"] for p in params]
        assert_close(found, buffers, tolerance)
    else:
        assert not optimizer.state


@pytest.mark.parametrize("rate", [0.0, 1e-30, 29.0])
@pytest.mark.parametrize("clip", [False, True])
def test_extreme_rates_stay_finite(rate, clip):
    weights, gradients = problem(steps=3)
    options = lars_oracle.Options(trust_clip=clip)
    wanted, _ = lars_oracle.run(weights, gradients, [rate] * 3, options)
    params = as_params(weights)
    train(LARS(params, weight_decay=5e-4, trust_clip=clip), params, gradients, [rate] * 3)
    assert_close(params, wanted, 1e-12)


@pytest.mark.parametrize(
    ("nesterov", "clip", "decay"),
    list(itertools.product([False, True], [False, True], [0.0, 5e-4])),
)
def test_equals_timm(nesterov, clip, decay):
    weights, gradients = problem()
    ours, theirs = as_params(weights), as_params(weights)
    shared = {"momentum": 0.9, "weight_decay": decay, "nesterov": nesterov, "trust_clip": clip}
    peer = timm.optim.Lars(theirs, lr=0.1, trust_coeff=0.02, eps=1e-8, always_adapt=True, **shared)
    train(peer, theirs, gradients, RATES)
    ours_lars = LARS(ours, trust_coefficient=0.02, eps=1e-8, lr_position="update", **shared)
    train(ours_lars, ours, gradients, RATES)
    assert_close(ours, [p.detach().numpy() for p in theirs], 1e-12)


@pytest.mark.parametrize("clip", [False, True])
def test_equals_apex_larc(clip):
    weights, gradients = problem()
    ours, theirs = as_params(weights), as_params(weights)
    ours_lars = LARS(
        ours,
        weight_decay=5e-4,
        trust_coefficient=0.02,
        eps=1e-8,
        lr_position="update",
        trust_clip=clip,
    )
    train(ours_lars, ours, gradients, RATES)
    peer = LarcSgd(theirs, 0.1, 0.9, 5e-4, 0.02, clip, 1e-8)
    for grads, rate in zip(gradients, RATES, strict=True):
        peer.sgd.param_groups[0]["lr"] = rate
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = torch.from_numpy(grad).clone()
        peer.step()
    assert_close(ours, [p.detach().numpy() for p in theirs], 1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_optax_rule(nesterov):
    weights, gradients = problem()
    ours, theirs = as_params(weights), as_params(weights)
    options = {"weight_decay": 5e-4, "trust_coefficient": 0.02, "eps": 1e-6, "nesterov": nesterov}
    train(LARS(ours, denominator="combined", **options), ours, gradients, RATES)
    peer = OptaxLars(theirs, momentum=0.9, **options)
    for grads, rate in zip(gradients, RATES, strict=True):
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = torch.from_numpy(grad)
        peer.step(rate)
    assert_close(ours, [p.detach().numpy() for p in theirs], 1e-12)


@pytest.mark.parametrize(
    ("nesterov", "printed"),
    [
        # optax.lars 0.2.8 on jax 0.10.2, float64, weights after five steps
        (
            False,
            [-0.3856428440747192, -0.029478858229858462, 1.4385051451874176]
            + [-0.2576938556288798, 3.023803686498482, 0.17841840031854161],
        ),
        (
            True,
            [-0.3581714263894613, 0.2656114742743058, 1.1174147216362242]
            + [-0.23264830985975787, 3.064338236961766, 0.21164842612268292],
        ),
    ],
)
def test_equals_what_optax_printed(nesterov, printed):
    param = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [0.25, 3.0, -0.75]]).double())
    options = {"weight_decay": 5e-3, "trust_coefficient": 0.02, "eps": 1e-6, "nesterov": nesterov}
    optimizer = LARS([param], denominator="combined", **options)
    for t, rate in enumerate([2.0, 3.0, 0.5, 4.0, 1.0]):
        optimizer.param_groups[0]["lr"] = rate
        param.grad = torch.sin(param.detach() * (t + 1)) + 0.1 * t
        optimizer.step()
    assert param.detach().flatten().tolist() == pytest.approx(printed, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_adaptation_it_is_torch_sgd(nesterov):
    weights, gradients = problem()
    ours, theirs = as_params(weights), as_params(weights)
    groups = [{"params": ours, "adapt": "none"}]
    options = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": nesterov}
    train(LARS(groups, lr_position="update", **options), ours, gradients, RATES)
    train(torch.optim.SGD(theirs, **options), theirs, gradients, RATES)
    assert_close(ours, [p.detach().numpy() for p in theirs], 1e-12)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("eps", [0.0, 0.5, 0.0]),
        ("weight_decay", [1e-3, 0.1, 0.0]),
        ("trust_coefficient", [0.001, 0.02, 0.5]),
        ("zero_norm", ["unit", "skip", "unit"]),
    ],
)
def test_a_groups_new_values_are_taken_by_its_next_step(key, values):
    """As by a new optimizer of the same state: constants are kept from step to step."""
    params = [nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.zeros(1, 2))]
    kept = LARS(params, momentum=0.5)
    for value in values:
        kept.param_groups[0][key] = value
        copies = [nn.Parameter(param.detach().clone()) for param in params]
        anew = LARS(copies, momentum=0.5)
        anew.load_state_dict(copy.deepcopy(kept.state_dict()))
        for param, other in zip(params, copies, strict=True):
            param.grad, other.grad = torch.ones(1, 2), torch.ones(1, 2)
        kept.step()
        anew.step()
        assert all(param.equal(other) for param, other in zip(params, copies, strict=True))


def test_a_bias_takes_the_ratio_of_its_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    options = lars_oracle.Options(trust_coefficient=0.02)
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = LARS(
        parameter_groups(model, options.weight_decay, adapt="layer"), trust_coefficient=0.02, lr=3.0
    )
    model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, param in model.named_parameters():
        weight = name.replace("bias", "weight")
        grad = param.grad.numpy()
        ratio, decay = 1.0, 0.0
        if not name.startswith("1."):
            gradient = dict(model.named_parameters())[weight].grad.numpy()
            ratio = lars_oracle.trust_ratio(before[weight], gradient, 3.0, options)
            decay = options.weight_decay if name.endswith("weight") else 0.0
        wanted = before[name] - 3.0 * ratio * (grad + decay * before[name])
        np.testing.assert_allclose(param.detach().numpy(), wanted, rtol=1e-12)


def test_a_bias_of_a_frozen_weight_takes_the_plain_rate():
    model = nn.Linear(3, 2).double()
    groups = parameter_groups(model, adapt="layer")
    optimizer = LARS(groups, lr=0.5, momentum=0.0)
    model.weight.requires_grad_(False)
    before = model.bias.detach().clone()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.5)


@pytest.mark.parametrize("layout", ["weight", "gradient"])
@pytest.mark.parametrize("denominator", ["separate", "combined"])
def test_channels_last_changes_nothing(layout, denominator):
    weights, gradients = problem()
    plain, last = as_params(weights), as_params(weights)
    if layout == "weight":
        last[0].data = last[0].data.to(memory_format=torch.channels_last)
    options = {"weight_decay": 5e-4, "denominator": denominator}
    train(LARS(plain, **options), plain, gradients, RATES)
    optimizer = LARS(last, **options)
    for grads, rate in zip(gradients, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for param, grad in zip(last, grads, strict=True):
            param.grad = torch.from_numpy(grad)
        if layout == "gradient":
            last[0].grad = last[0].grad.to(memory_format=torch.channels_last)
        optimizer.step()
    assert_close(last, [p.detach().numpy() for p in plain], 1e-13)


def test_step_leaves_gradients_untouched_and_takes_a_closure():
    param = nn.Parameter(torch.tensor([3.0, 4.0]).reshape(1, 2))
    optimizer = LARS([param], lr=1.0, weight_decay=0.1, momentum=0.0)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25.0
    assert torch.equal(param.grad, torch.tensor([[6.0, 8.0]]))
    # λ = 0.001·5 / (10 + 0.1·5); w -= λ·(g + 0.1·w)
    torch.testing.assert_close(param.detach(), torch.tensor([[3.0, 4.0]]) * (1 - 0.01 / 21 * 2.1))


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2, 2))
    assert unused not in optimizer.state
    assert not torch.equal(used.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(("kernel", "scale"), [("elsewhere", None), ("gpu", None), ("gpu", 8.0)])
def test_nothing_is_copied_from_the_device_to_the_host(kernel, scale, take_kernel, monkeypatch):
    weights, gradients = problem(steps=2)
    params = as_params(weights)
    optimizer = LARS(params, weight_decay=5e-4, trust_clip=True, zero_norm="skip")
    take_kernel(kernel)

    def refuse(*_):
        raise AssertionError("a step read a tensor's value on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step(loss_scale=scale)
    monkeypatch.undo()
    assert not np.array_equal(params[0].detach().numpy(), weights[0])


def test_state_survives_a_round_trip_in_the_middle():
    weights, gradients = problem()
    whole, halves = as_params(weights), as_params(weights)
    train(LARS(whole, weight_decay=5e-4), whole, gradients, RATES)
    first = LARS(halves, weight_decay=5e-4)
    train(first, halves, gradients[:10], RATES[:10])
    second = LARS(halves, lr=99.0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    train(second, halves, gradients[10:], RATES[10:])
    assert_close(halves, [p.detach().numpy() for p in whole], 1e-15)


def test_it_works_with_lr_scheduler_grad_scaler_and_deepcopy():
    model = nn.Linear(4, 2)
    optimizer = LARS(parameter_groups(model, 5e-4), lr=2.0)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=4, power=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rates = []
    for step in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = model(torch.full((1, 4), 1e38 if step == 1 else 1.0)).sum()
        before = copy.deepcopy(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        moved = not torch.equal(model.weight, before.weight)
        assert moved == (step != 1)  # the overflow of step 1 is skipped
    assert rates == pytest.approx([2.0, 2.0 * 0.75**2, 2.0 * 0.5**2, 2.0 * 0.25**2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; it must be finite and not negative"),
        ({"lr": math.nan}, "lr is nan"),
        ({"momentum": math.inf}, "momentum is inf"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"trust_coefficient": -1.0}, "trust_coefficient is -1.0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"lr_position": "outside"}, "lr_position is 'outside'; allowed: momentum, update"),
        ({"denominator": "sum"}, "denominator is 'sum'; allowed: separate, combined"),
        ({"zero_norm": "one"}, "zero_norm is 'one'; allowed: unit, skip, coast"),
        ({"kernel": "fast"}, "kernel is 'fast'; allowed: auto, native, fused, eager"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum above 0"),
    ],
)
def test_bad_hyper_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(2))], **options)


def test_bad_tensors_and_groups_are_named():
    with pytest.raises(ValueError, match=r"shape \(3,\) is complex"):
        LARS([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="ratio_from"):
        LARS([{"params": [nn.Parameter(torch.ones(3))], "adapt": "layer"}])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LARS(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 2\) has a sparse one"):
        optimizer.step()
    with pytest.raises(ValueError, match="adapt is 'some'"):
        parameter_groups(embedding, adapt="some")
    with pytest.raises(ValueError, match="Embedding has no parameter"):
        parameter_groups(embedding.requires_grad_(False))


def test_a_copy_of_the_optimizer_steps():
    param = nn.Parameter(torch.ones(2, 2))
    twin = copy.deepcopy(LARS([param], weight_decay=0.1))
    (copied,) = twin.param_groups[0]["params"]
    copied.grad = torch.ones(2, 2)
    twin.step()
    assert torch.equal(param.detach(), torch.ones(2, 2))
    assert not torch.equal(copied.detach(), torch.ones(2, 2))


def test_a_refused_group_is_not_kept():
    optimizer = LARS([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


def test_parameter_groups_by_kind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    weights, others = ["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]

    def described(**options):
        groups = parameter_groups(model, 0.1, **options)
        return [(g["names"], g["adapt"], g["weight_decay"]) for g in groups]

    assert described() == [(weights, "own", 0.1), (others, "none", 0.0)]
    assert described(adapt="all") == [(weights, "own", 0.1), (others, "own", 0.0)]
    assert described(adapt="none", decay="all") == [(weights, "none", 0.1), (others, "none", 0.1)]
    assert described(adapt="layer") == [
        (weights, "own", 0.1),
        (["0.bias", "3.bias"], "layer", 0.0),
        (["1.weight", "1.bias"], "none", 0.0),
    ]
    assert parameter_groups(model, adapt="layer")[1]["ratio_from"] == [0, 1]


@pytest.mark.parametrize("kind", [LARS, LAMB])
@pytest.mark.parametrize("later", [False, True])
def test_biases_of_a_second_network_take_their_own_weights_ratios(kind, later):
    """A backbone and a head, in one list or by ``add_param_group`` to unfreeze."""
    backbone, head = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2)
    whole = nn.Sequential(backbone, head)
    groups = [parameter_groups(each, adapt="layer") for each in (backbone, head)]
    optimizer = kind(groups[0] if later else [*groups[0], *groups[1]], lr=1.0)
    for group in groups[1] if later else ():
        optimizer.add_param_group(group)
    ends = [[param.detach().clone() for param in whole.parameters()]]
    for each in (optimizer, kind(parameter_groups(whole, adapt="layer"), lr=1.0)):
        for param, start in zip(whole.parameters(), ends[0], strict=True):
            param.data.copy_(start)
            param.grad = torch.linspace(0.1, 1.0, param.numel()).view_as(param)
        each.step()
        ends.append([param.detach().clone() for param in whole.parameters()])
    for found, wanted in zip(ends[1], ends[2], strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_bias_without_its_weights_group_is_refused():
    model = nn.Linear(3, 4)
    _, biases = parameter_groups(model, adapt="layer")
    optimizer = LARS([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(
        ValueError, match=r"a bias of shape \(4,\) .* in no group: add the weights'"
    ):
        optimizer.add_param_group(biases)
    assert len(optimizer.param_groups) == 1


def test_normalisation_over_several_dimensions_is_no_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 2, 2]), nn.RMSNorm([4, 2, 2]))
    names = [group["names"] for group in parameter_groups(model)]
    assert names == [["0.weight"], ["0.bias", "1.weight", "1.bias", "2.weight"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [False, True])
def test_fsdp_is_refused(original):
    """Its flat parameters were taken for biases: plain momentum SGD at LARS's rate."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="is sharded by FSDP"):
            parameter_groups(model)
        if not original:
            with pytest.raises(ValueError, match="is FSDP's, which joins layers"):
                LARS(model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_no_momentum_yet_can_be_restored():
    param = nn.Parameter(torch.ones(3))
    optimizer = LARS([param])
    optimizer.set_momentum(param, optimizer.momentum(param))
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.set_momentum(param, None)
    assert optimizer.momentum(param) is None
    optimizer.step()
    assert optimizer.momentum(param).any()
