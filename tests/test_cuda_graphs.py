"""What surrounds CUDA graphs: parts, fallbacks, and gradients that come at once; no GPU is needed.

A graph's replay is stood in for by running its part again; tests/test_on_gpu.py has real ones.
"""

import random
import types

import numpy as np
import pytest
import torch
from commands import hvd_lars
from torch import nn
from torchvision.models import get_model

from hvd_lars import LARS, Replicated, Sharded, parameter_groups
from hvd_lars.train import cuda_graphs
from hvd_lars.train.cuda_graphs import GraphedNetwork
from hvd_lars.train.graph_parts import NotCapturable


def run_again(parts):
    """In place of a capture."""
    for part in parts:
        part.part = part.part.forward  # which replays will take the place of
        part.run_forward()
        part.output_gradient = torch.zeros_like(part.output)
        part.forward = types.SimpleNamespace(replay=torch.enable_grad()(part.run_forward))
        part.backward = types.SimpleNamespace(replay=torch.enable_grad()(part.run_backward))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(cuda_graphs, "_capture", run_again)


class Net(nn.Module):
    """A loose layer, two blocks with BatchNorm, of which one is larger, and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.small = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.large = nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16)),
            nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()),
        )
        self.head = nn.Linear(16, 5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.head(self.large(self.small(self.stem(images))).mean((2, 3)))


def train(comm, placed, use, cut):
    torch.manual_seed(0)
    model = Net().train()
    placement = placed(model.parameters(), comm, bucket_bytes=2000, early_norms=True)
    optimizer = LARS(parameter_groups(model, 1e-3), lr=0.5, placement=placement)
    network = model
    if use:
        take = placement.gradients.take
        network = GraphedNetwork(model, torch.zeros(4, 3, 8, 8), "fp32", take, cut)
        assert [type(part).__name__ for part in network.parts] == (
            ["Sequential"] * 3 if cut else ["Net"]
        )
    draw = torch.Generator().manual_seed(comm.rank)
    for _ in range(4):
        optimizer.zero_grad()
        for size, last in ((4, False), (4, False), (3, True)):  # the last is run as it is
            images = torch.randn(size, 3, 8, 8, generator=draw)
            loss = network(images).logsumexp(1).sum()
            if last:
                loss.backward()
            else:
                with placement.gradients.no_sync():
                    loss.backward()
        optimizer.step()
    placement.complete_parameters()
    return model.state_dict()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_gradients_that_come_at_once_train_as_those_of_hooks(comm, placed, cut):
    wanted, found = (train(comm, placed, use, cut) for use in (False, True))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def network_of(model, side=32, cut=False):
    images = torch.zeros(2, 3, side, side)
    return GraphedNetwork(model.train(), images, "fp32", lambda *_: None, cut)


def test_a_large_network_is_cut_where_no_part_is_much_more_than_a_quarter():
    model = get_model("resnet50", num_classes=10)
    parts = network_of(model, cut=True).parts
    sizes = [sum(param.numel() for param in part.parameters()) for part in parts]
    assert max(sizes) < 0.3 * sum(param.numel() for param in model.parameters())
    assert sum(sizes) > 0.99 * sum(param.numel() for param in model.parameters())
    assert parts[0] is model.layer1


def test_what_is_not_a_step_of_the_captured_shape_runs_as_it_is(monkeypatch):
    model = Net()
    network = network_of(model, side=8)
    images = torch.randn(2, 3, 8, 8)
    replays = []
    apply = cuda_graphs._Replay.apply
    monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda *a: replays.append(1) or apply(*a))
    assert network(images).grad_fn is not None
    assert len(replays) == 1
    network(images[:1])
    network(torch.randn(2, 3, 9, 9))
    network(images.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        network(images)
    model.eval()
    assert torch.equal(network(images), model(images))
    assert len(replays) == 1
    assert "forward" not in vars(model)


def test_capturing_leaves_buffers_gradients_and_random_state_alone():
    model = nn.Sequential(Net(), nn.Dropout(0.5), nn.BatchNorm1d(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    network_of(model, side=8, cut=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_a_forward_of_ones_own_stays(monkeypatch):
    model = Net()
    for part in (model, model.small, model.large):
        part.forward = lambda images, own=part.forward: 3 * own(images)
    images = torch.randn(2, 3, 8, 8)
    wanted = model.train()(images)
    for cut in (False, True):
        network = network_of(model, side=8, cut=cut)
        torch.testing.assert_close(network(images), wanted)
        assert "forward" in vars(model.small)
        torch.testing.assert_close(model(images), wanted)


def test_the_blocks_of_a_list_are_parts():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(6)]
            self.blocks = nn.ModuleList(blocks)
            self.register_buffer("expanded", torch.ones(1).expand(5))

        def forward(self, images):
            for block in self.blocks:
                images = block(images)
            return images.mean((2, 3))

    model = Blocks()
    assert network_of(model, cut=True).parts == list(model.blocks)


class Odd(nn.Module):
    """Two parts and one oddity."""

    def __init__(self, how):
        super().__init__()
        self.how, self.body = how, nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
        self.head = nn.Sequential(nn.Conv2d(3, 5, 1))
        self.register_buffer("seen", torch.zeros(1))
        if how == "shared":
            self.head[0].weight = nn.Parameter(torch.randn(3, 3, 3, 3))
            self.body[0].weight = self.head[0].weight
            self.head[0].bias = nn.Parameter(torch.zeros(3))
        if how == "hook":
            self.head.register_forward_pre_hook(lambda *_: None)
        if how == "backward hook":
            self.head[0].register_full_backward_pre_hook(lambda *_: None)

    def forward(self, images):
        if (
            self.how in ("random", "numpy")
            and {"random": random, "numpy": np.random}[self.how].random() > 2
        ):
            return images
        if self.how == "buffer":
            self.seen = self.seen + images.mean().detach()
        inner = self.body(images)
        if self.how == "outside":
            inner = inner + 0.01 * self.body[0](images)
        if self.how == "no part in float32":
            with torch.autocast("cpu", torch.bfloat16):
                inner = self.head(inner).float()
        else:
            inner = self.head(inner)
        logits = inner.mean((2, 3))
        return (logits, logits) if self.how == "two" else logits


@pytest.mark.parametrize(
    ("how", "cut", "why"),
    [
        ("two", False, "the network takes or returns more than a tensor"),
        ("shared", True, "parts of the network share parameters"),
        ("hook", True, "Sequential has hooks, which a graph would leave out"),
        ("backward hook", True, "Conv2d has hooks, which a graph would leave out"),
        ("random", False, "forward draws random numbers on the host"),
        ("numpy", False, "forward draws random numbers on the host"),
        ("buffer", False, "forward replaces parameters or buffers"),
        ("outside", True, "Conv2d is called inside of a part of the network and outside"),
    ],
)
def test_what_cannot_be_a_graph_says_why(how, cut, why):
    with pytest.raises(NotCapturable, match=why):
        network_of(Odd(how), cut=cut)


def test_a_part_in_other_surroundings_runs_as_it_is():
    model = Odd("no part in float32")
    assert network_of(model, cut=True).parts == [model.body]
    assert network_of(Odd("none"), cut=True).parts[0] is not model.body


@pytest.mark.parametrize("where", ["before a zero", "everywhere"])
def test_a_graph_with_wrong_gradients_is_found_out(monkeypatch, where):
    def wrong(parts):
        run_again(parts)
        for part in parts:

            def replay(part=part, right=part.backward.replay):
                right()
                last = len(part.gradients) - 4  # those of the last normalisation and convolution
                part.gradients = tuple(
                    g if g is None or (where == "before a zero" and i >= last) else -g
                    for i, g in enumerate(part.gradients)
                )

            part.backward = types.SimpleNamespace(replay=replay)

    monkeypatch.setattr(cuda_graphs, "_capture", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    nn.init.zeros_(model[4].weight)
    with pytest.raises(NotCapturable, match="its gradients are off by [0-9]+% when"):
        network_of(model, side=8)


def test_a_graph_that_computes_something_else_is_found_out(monkeypatch):
    def frozen(parts):
        run_again(parts)
        for part in parts:
            first, forward, backward = part.output, part.forward.replay, part.backward.replay

            def repeat(part=part, first=first, forward=forward):
                forward()
                part.right, part.output = part.output, first

            def finish(part=part, backward=backward):
                part.output = part.right
                backward()

            part.forward = types.SimpleNamespace(replay=repeat)
            part.backward = types.SimpleNamespace(replay=finish)

    monkeypatch.setattr(cuda_graphs, "_capture", frozen)
    with pytest.raises(NotCapturable, match="its outputs are off by .*% when they are repeated"):
        network_of(Net(), side=8)


@pytest.mark.parametrize("how", ["true", "always"])
def test_a_run_that_cannot_have_graphs_says_so(tmp_path, how):
    arguments = ["train", "digits", f"run.dir={tmp_path}/run", f"train.cuda_graphs={how}"]
    code, output = hvd_lars(
        *arguments, "train.duration=20 steps", "schedule.warmup_duration=2 steps"
    )
    assert code == 2
    if how == "always":
        wanted = "train.cuda_graphs: found 'always'; must be 'auto', True or False"
    elif torch.cuda.is_available():
        pytest.skip("they can be had")
    else:
        wanted = "train.cuda_graphs: a rank computes on the CPU"
    assert wanted in output
