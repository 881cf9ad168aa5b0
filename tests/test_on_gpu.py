"""The same numbers on a GPU as on the CPU: optimizers, augmentation, training, several ranks."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import lars_oracle
from test_augment import OPTIONS as AUGMENTATIONS
from test_augment import finished
from test_image_folder import make_folder, source_of
from test_lars import COMBINATIONS, RATES, assert_close, problem
from torch import nn
from torchvision.models import get_model

from hvd_lars import LAMB, LARS, Replicated, parameter_groups
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.images import DeviceWork
from hvd_lars.data.source import Request
from hvd_lars.launchers.local import launcher_environment, local_command
from hvd_lars.models import build_model
from hvd_lars.runtime.device import seed_generators
from hvd_lars.train import cuda_graphs
from hvd_lars.train.cuda_graphs import GraphedNetwork
from hvd_lars.train.graph_parts import NotCapturable
from hvd_lars.train.precision import autocast

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
HANG_GUARD = 300
SMALL = ("digits", "schedule.base_lr=0.5", "train.duration=8 epochs")  # 32 would amplify rounding


def steps(optimizer, params, gradients, scale):
    """Take the steps; every gradient is multiplied by the loss scale, and one batch is lost."""
    for step, (grads, rate) in enumerate(zip(gradients, RATES, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for lost in (True, False) if step == 5 and scale is not None else (False,):
            for param, grad in zip(params, grads, strict=True):
                param.grad = torch.from_numpy(grad).to(param) * (scale or 1.0)
            if lost:
                params[1].grad[0, 0] = torch.inf
            tensor = None if scale is None else torch.tensor(scale, dtype=torch.float64).to(GPU)
            optimizer.step(loss_scale=tensor)


def as_params(weights, dtype, device):
    return [nn.Parameter(torch.from_numpy(w).to(device, dtype, copy=True)) for w in weights]


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", ["native", "eager"])
def test_every_combination_of_options_against_the_oracle(kernel, dtype, scale):
    weights, gradients = problem(zero_weight=True, zero_gradient=True)
    combinations = COMBINATIONS if (kernel, scale) == ("native", None) else COMBINATIONS[::5]
    for position, denominator, clip, zero_norm, (momentum, nesterov), (decay, eps) in combinations:
        options = lars_oracle.Options(
            momentum=momentum, weight_decay=decay, trust_coefficient=0.02, eps=eps,
            nesterov=nesterov, lr_position=position, denominator=denominator, trust_clip=clip,
            zero_norm=zero_norm,
        )  # fmt: skip
        wanted, buffers = lars_oracle.run(weights, gradients, RATES, options)
        params = as_params(weights, dtype, GPU)
        optimizer = LARS(params, **vars(options), kernel=kernel)
        steps(optimizer, params, gradients, scale)
        optimizer.unfold_momentum()
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        assert_close([p.cpu() for p in params], wanted, tolerance)
        if momentum:
            found = [optimizer.state[p]["momentum_buffer"].cpu() for p in params]
            assert_close(found, buffers, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lamb_takes_the_steps_that_it_takes_on_the_cpu(dtype):
    weights, gradients = problem()
    ends = []
    for device in (torch.device("cpu"), GPU):
        params = as_params(weights, dtype, device)
        optimizer = LAMB(params, lr=0.01, weight_decay=1e-2)
        for grads in gradients:
            for param, grad in zip(params, grads, strict=True):
                param.grad = torch.from_numpy(grad).to(param)
            optimizer.step()
        ends.append([param.detach().cpu() for param in params])
    for found, wanted in zip(*ends, strict=True):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "data", size=(20, 20))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_are_augmented_as_on_the_cpu(folder, name):
    work = DeviceWork(augment=True)
    indices = np.arange(8)
    source = source_of(folder, augment=AUGMENTATIONS[name], device_work=work)
    wanted, wanted_labels = finished(source, 0, indices)
    batch = [tensor.to(GPU) for tensor in source.train_batch(0, indices)]
    found, labels = source.on_device(*batch, Request(0, indices))
    assert found.is_cuda
    torch.testing.assert_close(labels.cpu(), wanted_labels)
    # A pixel on the border of a warp, or of a rounding to bytes, may fall to either side.
    off = (found.cpu() - wanted).abs() > 1e-4
    assert off.float().mean() < 0.01


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one"), 1)


def trained(folder, ranks, *overrides):
    """The losses that a run logs, and its last evaluation."""
    arguments = [*SMALL, *overrides, f"run.dir={folder}/{ranks}", "train.log_every=1 steps"]
    command = [sys.executable, "-m", "hvd_lars", "train", *arguments]
    if ranks > 1:
        command = local_command("mpirun", ranks, [*command, "comm.backend=mpi"])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=HANG_GUARD,
        env=launcher_environment() | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / f"{ranks}/metrics.jsonl").read_text().splitlines()
    records = list(map(json.loads, lines))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return losses, [record for record in records if record["kind"] == "eval"][-1]


@pytest.mark.parametrize(("ranks", "placement"), [(2, "sharded"), (3, "replicated")])
def test_ranks_that_share_a_gpu_train_as_one_device(tmp_path, one_device, ranks, placement):
    losses, found = trained(tmp_path, ranks, f"optimizer.placement={placement}")
    wanted, end = one_device
    torch.testing.assert_close(losses, wanted, rtol=2e-3, atol=1e-4)
    assert abs(found["top1"] - end["top1"]) <= 0.003


NETWORKS = {
    "resnet18": lambda: get_model("resnet18", num_classes=10),
    "efficientnet": lambda: get_model("efficientnet_b0", num_classes=10),  # stochastic depth
    "alexnet": lambda: build_model("alexnet_caffe", 10),  # dropout, no BatchNorm
    "vit": lambda: get_model("vit_b_16", num_classes=10, image_size=64),
}
SIDES = {"alexnet": 227}


def graphed(model, side, take, precision="fp32", cut=False):
    return GraphedNetwork(model, torch.zeros(8, 3, side, side, device=GPU), precision, take, cut)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_train_a_network_as_it_trains_itself(monkeypatch, name, cut, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    replays, apply = [], cuda_graphs._Replay.apply
    monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda *a: replays.append(1) or apply(*a))
    side = SIDES.get(name, 64)
    draw = torch.Generator().manual_seed(0)
    # The last one has another size, and runs beside the graphs.
    batches = [torch.randn(n, 3, side, side, generator=draw).to(GPU) for n in (8, 8, 8, 5)]
    labels = [torch.randint(10, (len(batch),), generator=draw).to(GPU) for batch in batches]
    ends = []
    for use in (False, True):
        torch.manual_seed(0)
        model = NETWORKS[name]().to(GPU).train()
        placement = Replicated(model.parameters(), LocalCommunicator(), early_norms=True)
        optimizer = LARS(parameter_groups(model, 1e-4), lr=0.02, placement=placement)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.cuda.get_rng_state()
        take = placement.gradients.take
        network = graphed(model, side, take, precision, cut) if use else model
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(param.grad is None for param in model.parameters())
        if use:
            assert (len(network.parts) > 1) == cut
        replays.clear()
        for step in range(4):
            optimizer.zero_grad()
            seed_generators(step, GPU)
            for i, (images, wanted) in enumerate(zip(batches, labels, strict=True)):
                with autocast(precision, GPU):
                    loss = nn.functional.cross_entropy(network(images), wanted)
                if i < len(batches) - 1:
                    with placement.gradients.no_sync():
                        loss.backward()
                else:
                    loss.backward()
            optimizer.step()
        # In four steps, three of the four micro-batches are of the captured size.
        assert len(replays) == (12 * len(network.parts) if use else 0)
        model.eval()
        with torch.no_grad():
            logits = network(batches[0])
        ends.append((loss.item(), logits.float(), list(model.parameters())))
        assert "forward" not in vars(model)
    (loss, logits, params), (graph_loss, graph_logits, graph_params) = ends
    tolerance = 2e-3 if precision == "fp32" else 5e-2
    assert abs(loss - graph_loss) < tolerance * max(1.0, abs(loss))
    assert (logits - graph_logits).norm() < 10 * tolerance * logits.norm()
    for param, found in zip(params, graph_params, strict=True):
        assert (param - found).norm() <= tolerance * param.norm() + 1e-3


class Moody(nn.Module):
    """Computes something else every time, reads a value, is called twice, or has a hook."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layers = how, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
        if how == "hook":
            self.layers.register_forward_hook(lambda *_: None)

    def forward(self, images):
        if self.how == "random":
            images = images * random.uniform(0.5, 2.0)
        if self.how == "reads" and images.mean().item() > 1e9:
            images = images + 1.0
        logits = self.layers(images)
        return {"logits": logits} if self.how == "returns" else logits


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("random", "forward draws random numbers on the host"),
        ("reads", "it waits for the GPU"),
        ("returns", "the network takes or returns more than a tensor"),
        ("hook", "Sequential has hooks, which a graph would leave out"),
    ],
)
def test_what_cannot_be_a_graph_says_why_and_trains_on(how, why):
    model = Moody(how).to(GPU).train()
    with pytest.raises(NotCapturable, match=why):
        graphed(model, 64, take=None)
    logits = model(torch.randn(8, 3, 64, 64, device=GPU))
    if how != "returns":
        logits.sum().backward()
        assert model.layers[1].weight.grad.isfinite().all()
