"""LAMB against its formulas written out, timm's, and itself over ranks."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import (
    GLOBAL_BATCH,
    RATES,
    TinySource,
    assert_same_parameters,
    tiny_loop,
    tiny_model,
    tiny_trainer,
)
from torch import nn

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.optim import LARS, Replicated, Sharded, parameter_groups
from hvd_lars.optim.lamb import LAMB
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.replicas import verify_agreement

SHAPES = [(7, 5), (3, 4, 2, 2), (6,), (1,)]
OPTIONS = {
    "default": {},
    "paper": {"max_weight_norm": 1.5},
    "clip": {"max_grad_norm": 0.5, "trust_clip": True},
    "uncorrected": {"bias_correction": False, "betas": (0.8, 0.95)},
    "unaveraged": {"grad_averaging": False, "max_grad_norm": 1.0, "eps": 1e-3},
}


def made(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def gradients(params, step):
    """Of some function that differs from step to step."""
    return [torch.cos(3 * param.detach() + step) for param in params]


class Oracle:
    """Algorithm 2 of the paper with the options, in numpy."""

    def __init__(self, params, decays, adapts, lr, **options):
        self.w = [param.detach().numpy().copy() for param in params]
        self.m = [np.zeros_like(w) for w in self.w]
        self.v = [np.zeros_like(w) for w in self.w]
        self.decays, self.adapts, self.lr, self.t = decays, adapts, lr, 0
        self.o = {"betas": (0.9, 0.999), "eps": 1e-6, "bias_correction": True} | options

    def step(self, gradients):
        o, self.t = self.o, self.t + 1
        b1, b2 = o["betas"]
        gradients = [g.numpy() for g in gradients]
        if o.get("max_grad_norm"):
            norm = math.sqrt(sum((g**2).sum() for g in gradients))
            gradients = [g / max(1.0, norm / o["max_grad_norm"]) for g in gradients]
        for i, g in enumerate(gradients):
            self.m[i] = b1 * self.m[i] + (1 - b1 if o.get("grad_averaging", True) else 1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            m, v = self.m[i], self.v[i]
            if o["bias_correction"]:
                m, v = m / (1 - b1**self.t), v / (1 - b2**self.t)
            u = m / (np.sqrt(v) + o["eps"]) + self.decays[i] * self.w[i]
            ratio = 1.0
            if self.adapts[i]:
                wn, un = np.linalg.norm(self.w[i]), np.linalg.norm(u)
                wn = min(wn, o.get("max_weight_norm", math.inf))
                ratio = wn / un if wn > 0 and un > 0 else 1.0
                ratio = min(ratio, 1.0) if o.get("trust_clip") else ratio
            self.w[i] = self.w[i] - self.lr * ratio * u


@pytest.mark.parametrize("case", OPTIONS)
def test_it_is_the_papers_algorithm(case):
    params = made()
    groups = [
        {"params": params[:2], "weight_decay": 0.02},
        {"params": params[2:], "weight_decay": 0.0, "adapt": "none"},
    ]
    optimizer = LAMB(groups, lr=0.03, **OPTIONS[case])
    decays, adapts = [0.02, 0.02, 0.0, 0.0], [True, True, False, False]
    oracle = Oracle(params, decays, adapts, 0.03, **OPTIONS[case])
    for step in range(20):
        wanted = gradients(params, step)
        for param, gradient in zip(params, wanted, strict=True):
            param.grad = gradient * 8.0
        optimizer.step(loss_scale=8.0)
        oracle.step(wanted)
    for param, w in zip(params, oracle.w, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"trust_clip": True}, {"grad_averaging": False}])
def test_it_takes_the_steps_of_timm(options):
    """All tensors adapted, as timm does where weight decay is not 0."""
    timm = pytest.importorskip("timm.optim")
    ours, theirs = made(), made()
    options = {"lr": 0.02, "weight_decay": 0.01, "max_grad_norm": 1.0} | options
    optimizers = LAMB(ours, **options), timm.Lamb(theirs, **options)
    for step in range(20):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param, gradient in zip(params, gradients(params, step), strict=True):
                param.grad = gradient
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_zero_norms_take_a_ratio_of_one():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))]
    optimizer = LAMB(params, lr=0.5)
    params[0].grad, params[1].grad = torch.ones(3), torch.zeros(3)
    optimizer.step()
    assert torch.allclose(params[0], torch.full((3,), -0.5), atol=1e-5)
    assert torch.equal(params[1], torch.ones(3))


def test_a_step_that_is_not_finite_changes_nothing():
    params = made()
    optimizer = LAMB(params, lr=0.1, max_grad_norm=1.0)
    states = []
    for step in range(4):
        for param, gradient in zip(params, gradients(params, step), strict=True):
            param.grad = gradient * (torch.inf if step in (0, 2) else 1.0)
        optimizer.step(loss_scale=1.0)
        assert optimizer.report.skipped == (step in (0, 2))
        slots = [optimizer.slot(name, p).clone() for p in params for name in optimizer.slots]
        states.append([*(param.detach().clone() for param in params), *slots])
    assert all(map(torch.equal, states[1], states[2]))
    assert all(torch.equal(a, b) for a, b in zip(states[0], made(), strict=False))
    assert states[3][-1] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LAMB(made(), **options)
    with pytest.raises(ValueError, match="found torch.bfloat16 on cpu"):
        LAMB(made(dtype=torch.bfloat16))


def test_copies_and_states_go_on_as_the_original(tmp_path):
    ends = []
    for way in ("same", "copy", "state"):
        params = made(dtype=torch.float32)
        optimizer = LAMB(params, lr=0.1, max_grad_norm=0.5)
        for step in range(6):
            if step == 3 and way == "copy":
                params, optimizer = copy.deepcopy((params, optimizer))
            if step == 3 and way == "state":
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = LAMB(params, lr=0.5, max_grad_norm=0.5)
                optimizer.load_state_dict(state)
            for param, gradient in zip(params, gradients(params, step), strict=True):
                param.grad = gradient
            optimizer.step()
        ends.append(torch.cat([param.detach().flatten() for param in params]))
        assert optimizer.slot("steps", params[0]).dtype == torch.float64
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("way", ["live", "state"])
def test_moments_follow_their_weights_into_another_layout(way):
    ends = []
    for switched in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3)
        optimizer = LAMB(conv.parameters(), lr=0.1, weight_decay=0.01)
        for step in range(6):
            if step == 3 and switched:
                conv.to(memory_format=torch.channels_last)
                if way == "state":
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = LAMB(conv.parameters())
                    optimizer.load_state_dict(state)
            for param, gradient in zip(conv.parameters(), gradients(conv.parameters(), step),
                                       strict=True):  # fmt: skip
                param.grad = gradient
            optimizer.step()
        ends.append(conv.weight.detach().contiguous())
    torch.testing.assert_close(ends[0], ends[1])


def test_a_weight_with_gaps_in_memory_is_trained():
    gapped = nn.Parameter(made()[1][:, :1])
    dense = nn.Parameter(gapped.detach().clone(memory_format=torch.contiguous_format))
    for param in (gapped, dense):
        optimizer = LAMB([param], lr=0.1)
        for step in range(3):
            param.grad = torch.cos(param.detach() + step)
            optimizer.step()
    assert not gapped.is_contiguous()
    torch.testing.assert_close(gapped, dense)


def test_a_parameter_counts_its_own_steps():
    """Those that another took meanwhile are not counted; a resume would else give other steps."""
    params = made()[:2]
    optimizer = LAMB(params)
    for step in range(5):
        optimizer.zero_grad()
        params[1].grad = torch.ones_like(params[1])
        if step == 0:
            params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert [float(optimizer.slot("steps", param)) for param in params] == [1.0, 5.0]


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing():
    params = made()
    optimizer = LAMB(params, lr=0.25)
    for other in (torch.optim.SGD(params, lr=0.1), torch.optim.Adam(params), LARS(params)):
        with pytest.raises(ValueError, match="LAMB: the state is another optimizer's"):
            optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_of_another_model_is_one_line():
    params = made()
    optimizer = LAMB(params)
    optimizer.set_slots(params[0], {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3),
                                    "steps": torch.ones((), dtype=torch.float64)})  # fmt: skip
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match=r"LAMB: exp_avg has shape \(3,\), but its weight"):
        optimizer.step()


@pytest.mark.parametrize("wide", [False, True])
def test_a_state_goes_into_a_placement_and_out_of_it(wide):
    """A placement's moments are flat."""
    ends = []
    for placed in ([False, False], [True, False], [False, True]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        if wide:
            model.to(memory_format=torch.channels_last)
        state = None
        for number, here in enumerate(placed):
            placement = Replicated(model.parameters(), LocalCommunicator()) if here else None
            optimizer = LAMB(model.parameters(), lr=0.1, placement=placement)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(2):
                optimizer.zero_grad()
                images = torch.arange(48.0).view(1, 3, 4, 4).sin() + step + number
                model(images).square().sum().backward()
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            del optimizer, placement
            model.zero_grad()
        ends.append(torch.cat([p.detach().contiguous().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_a_group_may_be_empty():
    assert len(LAMB([{"params": []}, {"params": made()}]).param_groups) == 2


def test_without_a_gradient_nothing_happens():
    params = made()
    LAMB(params).step(loss_scale=1.0)
    assert all(map(torch.equal, params, made()))


def with_lamb(trainer):
    """The trainer with LAMB in place of LARS."""
    groups = parameter_groups(trainer.model, 5e-3)
    optimizer = LAMB(groups, placement=trainer.placement, max_grad_norm=1.0)
    trainer.state.optimizer = trainer.optimizer = optimizer
    trainer.schedule = lambda step: RATES[step] / 100
    return trainer


def on_one_device():
    model = tiny_model(torch.float64)
    optimizer = LAMB(parameter_groups(model, 5e-3), max_grad_norm=1.0)
    source = TinySource(torch.float64)
    batches = GlobalBatches(source.num_train, GLOBAL_BATCH, seed=5)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate / 100
        optimizer.zero_grad()
        images, labels = source.train_batch(0, np.asarray(batches.indices(step)))
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_over_ranks_it_is_one_device(comm, placed, tmp_path):
    trainer = with_lamb(tiny_trainer(comm, torch.float64, 5, placed=placed))
    folder = comm.broadcast_object(tmp_path)
    tiny_loop(trainer, folder).run()
    wanted, optimizer = on_one_device()
    assert_same_parameters(trainer.model, wanted, 1e-9)
    for mine, theirs in zip(trainer.model.parameters(), wanted.parameters(), strict=True):
        for name in optimizer.slots:
            found = trainer.optimizer.slot(name, mine)
            torch.testing.assert_close(found, optimizer.slot(name, theirs), rtol=1e-7, atol=1e-12)
    verify_agreement(trainer.state.tensors(), comm)


@pytest.mark.ranks(1, 2, horovod=(2,))
@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_a_resumed_run_has_the_same_bits(comm, placed, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    ends = []
    for total in (8, 5):
        trainer = with_lamb(tiny_trainer(comm, torch.float32, 5, placed=placed))
        tiny_loop(trainer, folder / str(total), {"total": total, "checkpoint": 5}).run()
        ends.append(trainer)
    other = with_lamb(tiny_trainer(comm, torch.float32, 5, placed=placed, seed=9))
    Checkpointer(folder / "5", comm).restore(other.state)
    tiny_loop(other, folder / "more", {"total": 8}).run()
    wanted, found = ends[0].state.tensors(), other.state.tensors()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_entries_of_others_in_its_state_do_not_hinder_resuming():
    """Reading ``optimizer.state[param]`` of a frozen parameter makes an empty one."""
    params = made()
    optimizer = LAMB(params)
    optimizer.state["number"] = 4
    assert optimizer.state[params[0]] == {}
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    other = LAMB(made())
    other.load_state_dict(optimizer.state_dict())
    assert other.state["number"] == 4
    assert other.slot("steps", other.param_groups[0]["params"][1]).item() == 1.0


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_it_steps_inside_a_compiled_function():
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        params = made()
        optimizer = LAMB(params, lr=0.1)

        def step():
            for param, gradient in zip(params, gradients(params, 0), strict=True):  # noqa: B023
                param.grad = gradient
            optimizer.step()  # noqa: B023

        take = wrap(step)
        for _ in range(3):
            take()
        ends.append(torch.cat([param.detach().flatten() for param in params]))
    assert torch.equal(*ends)
