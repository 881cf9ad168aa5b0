"""A small model and data set for tests of whole steps, in any dtype."""

import numpy as np
import torch
from torch import nn

from hvd_lars.data.identity import made_identity
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.models.batch_norm import span_ranks
from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.optim import LARS, Replicated, parameter_groups
from hvd_lars.settings.durations import Intervals
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.run_state import RunState
from hvd_lars.train.evaluation import Evaluator
from hvd_lars.train.feed import Feed
from hvd_lars.train.loop import Loop
from hvd_lars.train.trainer import StepOptions, Trainer

GLOBAL_BATCH = 59  # divided by 1, 2, 3, 4 ranks and again by 2 and 5 it is uneven every time
RATES = [2.0, 3.0, 0.5, 4.0, 0.0, 1.0, 8.0, 0.1]


class TinySource:
    """Images (n, 3, 6, 6) and labels of 5 classes, fixed."""

    num_train, num_eval, num_classes = 2 * GLOBAL_BATCH, 37, 5
    mixes_pairs = False

    def __init__(self, dtype):
        self.unreadable = []
        self.identity = made_identity("tiny", self.num_train, self.num_eval, self.num_classes)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(200, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(5, (200,), generator=generator)

    def train_batch(self, epoch, indices):
        return self.images[indices], self.labels[indices]

    def eval_batch(self, indices):
        return self.images[indices + 150 - 37], self.labels[indices + 150 - 37]

    def on_device(self, images, labels, request):
        return images, labels


def tiny_model(dtype, seed=0, norm=False):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3),
        *([nn.BatchNorm2d(7)] if norm else []),
        nn.ReLU(),
        nn.Conv2d(7, 5, 3),
        *([nn.BatchNorm2d(5, momentum=None, affine=False)] if norm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 13),
        nn.Tanh(),
        nn.Linear(13, 5),
    ).to(dtype)


def tiny_trainer(
    comm,
    dtype,
    micro_batch,
    adapt="weights",
    seed=0,
    norm=False,
    ema=None,
    placed=Replicated,
    precision="fp32",
    channels_last=False,
    max_skipped_steps=10,
    late=False,
    noise_every=0,
    **options,
):
    """A Trainer of the tiny model whose buckets are small enough that there are several.

    ``late``: outcomes are read a step late, as on a GPU.
    With ``norm`` it has BatchNorms over all ranks, with ``ema`` a moving average.
    """
    model = tiny_model(dtype, seed, norm)
    average = MovingAverage(model, ema) if ema else None
    if norm:
        span_ranks(model, comm.group(comm.size))
    placement = placed(model.parameters(), comm, bucket_bytes=700, early_norms=True)
    groups = parameter_groups(model, 5e-3, adapt=adapt)
    optimizer = LARS(groups, trust_coefficient=0.02, placement=placement, **options)
    source = TinySource(dtype)
    batches = GlobalBatches(source.num_train, GLOBAL_BATCH, seed=5)
    return Trainer(
        RunState(model, optimizer, average),
        placement,
        Feed(source, batches, comm, torch.device("cpu"), micro_batch, len(RATES)),
        lambda step: RATES[step % len(RATES)],
        comm,
        StepOptions(3, 0.0, precision, channels_last, max_skipped_steps, noise_every, late),
    )


def tiny_evaluator(trainer, batch=8):
    """Of the tiny test set."""
    return Evaluator(trainer.feed.source, trainer.comm, batch, trainer.feed.device)


def tiny_loop(trainer, folder, every=None, **options):
    """A Loop around it that keeps checkpoints in a folder; ``every``: other intervals."""
    intervals = Intervals(
        **({"total": 8, "evaluate": 4, "log": 3, "checkpoint": 5} | (every or {}))
    )
    checkpointer = Checkpointer(folder, trainer.comm)
    return Loop(trainer, intervals, tiny_evaluator(trainer), checkpointer, **options)


def one_device(dtype, adapt="weights", norm=False, **options):
    """The same training by one device that holds the whole batch, written out."""
    model = tiny_model(dtype, norm=norm)
    groups = parameter_groups(model, 5e-3, adapt=adapt)
    optimizer = LARS(groups, trust_coefficient=0.02, **options)
    source = TinySource(dtype)
    batches = GlobalBatches(source.num_train, GLOBAL_BATCH, seed=5)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        images, labels = source.train_batch(0, np.asarray(batches.indices(step)))
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, optimizer


def assert_same_parameters(model, reference, tolerance):
    """All parameters together within ``tolerance``, relative; no tensor ten times as far.

    A bias of small norm that moves by the plain rate collects more rounding than the rest, how much
    depends on the processor; a step that is wrong in one tensor is off by far more.
    """
    far = size = 0.0
    for (name, found), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        distance = (found - wanted).norm() / wanted.norm()
        assert distance < 10 * tolerance, f"{name}: relative distance {distance:.2e}"
        far += (found - wanted).double().square().sum().item()
        size += wanted.double().square().sum().item()
    assert (far / size) ** 0.5 < tolerance, f"relative distance {(far / size) ** 0.5:.2e}"
