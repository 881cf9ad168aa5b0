"""What a torch optimizer promises, for every kernel."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

from hvd_lars import LARS, Replicated, parameter_groups
from hvd_lars.comm.local import LocalCommunicator

pytestmark = pytest.mark.parametrize("kernel", ["native", "fused", "eager"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def made(kernel, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    options = {"lr": 1.0, "trust_coefficient": 0.05} | options
    return model, LARS(parameter_groups(model, 5e-4), kernel=kernel, **options)


def steps(model, optimizer, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype)
        optimizer.step()


def assert_equal(model, other):
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["state_dict", "pickled state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(kernel, dtype, way):
    model, optimizer = made(kernel, dtype)
    steps(model, optimizer)
    optimizer.unfold_momentum()
    if way == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        state = optimizer.state_dict()  # its tensors are the live ones, as of any torch optimizer
        state = copy.deepcopy(state) if way == "state_dict" else pickle.loads(pickle.dumps(state))
        twin, other = made(kernel, dtype)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(state)
    for each in ((model, optimizer), (twin, other)):
        steps(*each, seed=2)
    assert_equal(model, twin)


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 2.0, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 2.0, "total_steps": 9},
    "LambdaLR": {"lr_lambda": lambda step: 1.0 / (1 + step)},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_sets_the_rate_of_the_step(kernel, name):
    model, optimizer = made(kernel)
    twin, other = made(kernel)
    scheduler = getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])
    for step in range(5):
        for mine, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            theirs |= {"lr": float(mine["lr"]), "momentum": mine["momentum"]}
        for each in ((model, optimizer), (twin, other)):
            steps(*each, count=1, seed=step)
        scheduler.step()
    assert_equal(model, twin)


@pytest.mark.parametrize("lr", [torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([[1.0]])])
@pytest.mark.parametrize("clip", [False, True])
def test_a_rate_may_be_a_tensor_of_one_element(kernel, lr, clip):
    model, optimizer = made(kernel, lr=lr, trust_clip=clip)
    twin, other = made(kernel, lr=1.0, trust_clip=clip)
    for each in ((model, optimizer), (twin, other)):
        steps(*each)
    assert_equal(model, twin)


def test_hooks_closures_and_a_rate_of_zero(kernel):
    model, optimizer = made(kernel, lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("state"))
    loss = optimizer.step(lambda: model(torch.ones(2, 6)).sum().backward() or 7.0)
    optimizer.state_dict()
    assert (loss, called) == (7.0, ["before", "after", "state"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_hook_puts_in_the_place_of_a_state_is_loaded(kernel, dtype):
    model, optimizer = made(kernel, dtype)
    steps(model, optimizer)
    state = optimizer.state_dict()
    renamed = copy.deepcopy(state)
    for values in renamed["state"].values():
        values["velocity"] = values.pop("momentum_buffer") / 3

    def translate(_, state):
        values = {
            key: {"momentum_buffer": each["velocity"] * 3}
            | {name: value for name, value in each.items() if name != "velocity"}
            for key, each in state["state"].items()
        }
        return state | {"state": values}

    twin, other = made(kernel, dtype)
    twin.load_state_dict(model.state_dict())
    other.register_load_state_dict_pre_hook(translate)
    other.register_load_state_dict_post_hook(lambda each: each.set_momentum(twin[0].bias, zero))
    zero = torch.zeros(5)
    other.load_state_dict(renamed)
    found = other.momentum(twin[0].weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, optimizer.momentum(model[0].weight))
    assert not other.momentum(twin[0].bias).any()
    with pytest.raises(ValueError, match="the state is another optimizer's"):
        other.load_state_dict(renamed | {"param_groups": [{"params": [0, 1, 2, 3]}]})


def test_state_of_others_beside_the_parameters(kernel):
    model, optimizer = made(kernel)
    steps(model, optimizer)
    optimizer.state["somebody's"] = {"count": 3}
    optimizer.state["number"] = 4
    steps(model, optimizer)
    assert optimizer.state_dict()["state"]["number"] == 4


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_steps_are_the_same(kernel):
    model, optimizer = made(kernel)
    twin, other = made(kernel)
    plain = other.step
    steps(model, optimizer)
    other.step = torch.compile(plain)
    steps(twin, other)
    for found, wanted in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_anothers_state_and_tensors_of_other_kinds_are_refused(kernel):
    model, optimizer = made(kernel)
    steps(model, optimizer)
    theirs = torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="another optimizer's: a group without adapt|denominator"):
        optimizer.load_state_dict(theirs.state_dict())
    program = """
import torch, torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, init_device_mesh, Replicate
from hvd_lars import LARS
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
try:
    LARS([param])
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "a parameter of shape (4, 3) is a DTensor" in done.stdout, done.stderr


def test_with_a_placement_a_copy_is_refused(kernel):
    model, _ = made(kernel)
    placement = Replicated(model.parameters(), LocalCommunicator())
    optimizer = LARS(model.parameters(), kernel=kernel, placement=placement)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="with a placement cannot be copied or pickled"):
            copied(optimizer)


def test_weights_that_others_replace_take_the_norms_that_they_have(kernel):
    model, optimizer = made(kernel)
    twin, other = made(kernel)
    for each in ((model, optimizer), (twin, other)):
        steps(*each)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach() * 3.0
    nn.utils.vector_to_parameters(vector, model.parameters())  # through param.data = …
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in ((model, optimizer), (twin, other)):
            steps(*each, seed=5)
    assert_equal(model, twin)


def test_weights_that_are_not_finite_are_no_edit(kernel):
    model, optimizer = made(kernel)
    steps(model, optimizer)
    model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
    assert model[0].weight.isnan().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_bias_shares_the_ratio_of_the_weight_beside_it(kernel):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.decoder.weight = self.embedding.weight
            self.lstm, self.attention = nn.LSTM(4, 3), nn.MultiheadAttention(4, 2)
            self.normed = parametrizations.weight_norm(nn.Linear(3, 3))
            self.spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
            self.old = nn.utils.weight_norm(nn.Linear(3, 3))
            self.norm = nn.BatchNorm1d(3)

    groups = parameter_groups(Net(), adapt="layer")
    weights = groups[0]["names"]
    sharing = dict(
        zip(groups[1]["names"], (weights[i] for i in groups[1]["ratio_from"]), strict=True)
    )
    assert sharing == {
        "decoder.bias": "embedding.weight",
        "lstm.bias_ih_l0": "lstm.weight_ih_l0",
        "lstm.bias_hh_l0": "lstm.weight_hh_l0",
        "attention.in_proj_bias": "attention.in_proj_weight",
        "attention.out_proj.bias": "attention.out_proj.weight",
        "normed.bias": "normed.parametrizations.weight.original1",
        "spectral.bias": "spectral.parametrizations.weight.original",
        "old.bias": "old.weight_v",
    }
    assert groups[2]["names"] == ["norm.weight", "norm.bias"]
    LARS(groups, kernel=kernel)


@pytest.mark.parametrize("size", [1e-18, 1e-10, 1.0, 1e10, 1e17])
def test_norms_hold_over_this_range_of_float32(kernel, size):
    """Squares are summed in float32 within a block: below 1e-22 and above 1e18 they lose digits."""
    torch.manual_seed(0)
    weight = torch.randn(300, 70)
    param = nn.Parameter(weight * size)
    optimizer = LARS([param], lr=1.0, momentum=0.0, trust_coefficient=0.5, kernel=kernel)
    param.grad = torch.randn(300, 70) * size
    grad = param.grad.double() / size
    optimizer.step()
    ratio = 0.5 * weight.double().norm() / grad.norm()
    wanted = weight.double() - ratio * grad
    assert (param.double() / size - wanted).norm() < 1e-6 * wanted.norm()
