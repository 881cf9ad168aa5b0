"""A steady step copies nothing to the host and never waits for the device, Horovod aside.

The stand-in for a device is ``meta``: it computes nothing, takes every operation that a GPU does,
and any read of a value raises an error by itself.
"""

import itertools
import traceback
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_image_folder import STATISTICS
from tiny import RATES
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_lars.comm.base import Then
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.augment import Augment
from hvd_lars.data.cifar import ArrayImages
from hvd_lars.data.identity import made_identity
from hvd_lars.data.images import DeviceWork, Images, Sizes
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.optim import LAMB, LARS, Replicated, Sharded, parameter_groups
from hvd_lars.state.run_state import RunState
from hvd_lars.train import cuda_graphs
from hvd_lars.train import trainer as trainer_module
from hvd_lars.train.cuda_graphs import GraphedNetwork
from hvd_lars.train.feed import Feed
from hvd_lars.train.trainer import StepOptions, Trainer

DEVICE = torch.device("meta")
PLACED, PRECISIONS = (Replicated, Sharded), ("fp32", "bf16", "fp16")
ON_DEVICE = DeviceWork(augment=True)
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
AUGMENT = {"lighting": 0.1, "random_erasing": 0.9, "mixup": 0.4, "cutmix": 1.0}
COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


class Waits(TorchDispatchMode):
    """Collects operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def add(self, wait):
        """Note a wait, and the package's line that it comes from."""
        frames = [f for f in traceback.extract_stack() if "/hvd_lars/" in f.filename]
        self.found.append((wait, *(f"{f.filename}:{f.lineno}" for f in frames[-1:])))

    def __enter__(self):
        self.lists = _Lists(self.add)
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        on_device = any(t.device == DEVICE for t in tensors)
        name = func.overloadpacket.__name__
        if (
            name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")
            and on_device
        ):
            self.add(name)
        target = kwargs.get("device")
        blocking = not kwargs.get("non_blocking", False)
        if name == "_to_copy" and target is not None and torch.device(target) != tensors[0].device:
            if on_device:
                self.add("a copy to the host")
            elif blocking:
                self.add("a copy to the device from memory that is not page-locked")
        if name == "copy_" and len(tensors) == 2 and len({t.device for t in tensors}) == 2:
            if tensors[0].device != DEVICE:
                self.add("a copy to the host")
            elif not any(a is True for a in args[2:]) and tensors[1].dim() and blocking:
                self.add("a copy to the device from memory that is not page-locked")
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """Tells of Python lists that torch copies to the device; to ``meta`` it copies nothing."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and torch.device(kwargs.get("device", "cpu")) == DEVICE:
            self.add("numbers of Python, copied to the device")
        if name in ("__getitem__", "__setitem__") and args[0].device == DEVICE:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, (list, np.ndarray)) for place in places):
                self.add("a list of places, copied to the device")
        return func(*args, **kwargs)


class Kept:
    """In place of the values of a step that arrive a step later: it was kept."""

    sent = 0

    def __init__(self, values):
        assert values.device == DEVICE
        self.count = len(values)
        Kept.sent += 1

    def read(self):
        return [1.0] * self.count


def images(augment):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3), dtype=np.uint8)
    store = ArrayImages(pixels, np.arange(64) % 5)
    identity = made_identity("tiny", 64, 64, 5)
    return Images(store, store, identity, Augment(**augment), Sizes(6, 6), 0, STATISTICS, ON_DEVICE)


def trainer_on(
    device, placed, precision, augment, comm=None, graphs=False, optimizer=LARS, **options
):
    layers = nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)
    model = nn.Sequential(*layers, nn.Linear(112, 13), nn.Linear(13, 5)).to(device)
    comm = comm or LocalCommunicator()
    placement = placed(model.parameters(), comm, bucket_bytes=700, early_norms=True)
    groups = parameter_groups(model, 5e-3, adapt="weights")
    optimizer = optimizer(groups, placement=placement, **options)
    source, take = images(augment), placement.gradients.take
    return Trainer(
        RunState(model, optimizer, MovingAverage(model, 0.9)),
        placement,
        Feed(source, GlobalBatches(64, 32, seed=5, pairs=True), comm, device, 8, 100),
        lambda step: RATES[step % len(RATES)],
        comm,
        StepOptions(3, 0.1, precision, read_late=True),
        GraphedNetwork(model, torch.zeros(8, 3, 6, 6, device=device), precision, take)
        if graphs
        else None,
    )


def moved(batches):
    """Batches as a GPU gets them: copied ahead, from page-locked memory."""
    for request, (pixels, labels) in batches:
        yield request, tuple(t.to(DEVICE, non_blocking=True) for t in (pixels, labels))


def share_counts(self, layers):
    """As LAMB's method, which reads the counts when the layers change."""
    steps = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for layer in layers.layers:
        self.state[layer.param]["steps"] = steps


PLAIN = [(placed, precision, AUGMENT, {}) for placed in PLACED for precision in PRECISIONS]


@pytest.mark.parametrize(
    ("placed", "precision", "augment", "options"),
    [
        *PLAIN,
        (Replicated, "fp32", AUGMENT | COLOURS, {"nesterov": True, "zero_norm": "skip"}),
        (Sharded, "fp16", AUGMENT, {"denominator": "combined", "trust_clip": True}),
        (Replicated, "fp32", AUGMENT, {"kernel": "eager"}),
        (Replicated, "fp16", AUGMENT, {"optimizer": LAMB}),
    ],
)
def test_a_steady_step_does_not_wait(monkeypatch, placed, precision, augment, options):
    monkeypatch.setattr(trainer_module, "Readback", Kept)
    monkeypatch.setattr(trainer_module, "autocast", lambda *_: nullcontext())  # meta has none
    monkeypatch.setattr(LAMB, "_share_counts", share_counts)
    trainer = trainer_on(DEVICE, placed, precision, augment, **options)
    trainer.state.average._begun = True  # as after a first good step
    batches = moved(trainer.feed.from_step(0))
    requests = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):  # tables are made, and copied, once
        trainer.train_step(batches)
    before = Kept.sent
    with Waits() as waits:
        for _ in range(3):
            trainer.placement.scalars.add(requests)
            trainer.train_step(batches)
    assert waits.found == []
    assert Kept.sent == before + 3, "one copy to the host a step, read a step later"
    assert len(list(trainer.outcomes())) > 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    ("placed", "precision", "options"),
    [
        *itertools.product(PLACED, PRECISIONS, [{"graphs": False}, {"graphs": True}]),
        (Replicated, "fp32", {"kernel": "eager"}),
        (Replicated, "fp16", {"optimizer": LAMB}),
    ],
)
def test_a_steady_step_does_not_wait_on_a_gpu(monkeypatch, placed, precision, options):
    """As above, with torch's own watch over a real device."""
    trainer = trainer_on(torch.device("cuda"), placed, precision, AUGMENT | COLOURS, **options)
    batches = trainer.feed.from_step(0)
    replays = []
    apply = cuda_graphs._Replay.apply
    monkeypatch.setattr(cuda_graphs._Replay, "apply", lambda *a: replays.append(1) or apply(*a))
    for _ in range(4):  # tables and kernels are made, the allocator grows
        trainer.train_step(batches)
    assert (len(replays) > 0) == options.get("graphs", False)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(list(trainer.outcomes(wait=True))) > 0


class Counted:
    """A communicator that counts the collectives it starts, and the waits for them."""

    def __init__(self, comm):
        self._comm, self.started, self.waits = comm, [], 0

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_all_reduce_sum(self, tensor, name):
        return self._count(name, self._comm.start_all_reduce_sum(tensor, name))

    def start_reduce_scatter_sum(self, flat, shard, name):
        return self._count(name, self._comm.start_reduce_scatter_sum(flat, shard, name))

    def start_all_gather(self, flat, name):
        return self._count(name, self._comm.start_all_gather(flat, name))

    def _count(self, name, pending):
        self.started.append(name)

        def note():
            self.waits += 1

        return Then(pending, note)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(("placed", "more"), [(Replicated, 0), (Sharded, 1)])
def test_a_steady_step_has_one_collective_a_bucket_and_one_for_its_scalars(comm, placed, more):
    """Sharded parameters are gathered, too; with votes and noise no step has another."""
    counted = Counted(comm)
    trainer = trainer_on(torch.device("cpu"), placed, "fp32", {}, counted)
    batches = trainer.feed.from_step(0)
    trainer.train_step(batches)
    trainer.placement.complete_parameters()
    counted.started.clear()
    counted.waits = 0
    buckets = len(trainer.placement.gradients.buckets)
    for _ in range(3):
        trainer.placement.scalars.add(torch.zeros(3, dtype=torch.float64))
        trainer.train_step(batches)
    trainer.placement.complete_parameters()
    assert buckets > 1
    assert len(counted.started) == counted.waits == 3 * (buckets * (1 + more) + 1)
