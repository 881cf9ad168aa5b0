"""The gradient noise scale is unbiased, however the batch is spread."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_loop, tiny_trainer
from torch import nn

from hvd_lars.data.identity import made_identity
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.metrics.sinks import JsonLines
from hvd_lars.optim import LARS, Replicated, Sharded
from hvd_lars.state.run_state import RunState
from hvd_lars.train.feed import Feed
from hvd_lars.train.trainer import StepOptions, Trainer

DIM, STEPS, BATCH, DISTANCE, DEVIATION = 20, 200, 24, 1.2, 2.0


class Quadratic(nn.Module):
    """Logits whose cross-entropy has, at weights of 0, gradients (p − onehot) ⊗ x: see ``TRUE``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, DIM))

    def forward(self, images):
        return images.flatten(1) @ self.weight.T.float()


class Noisy:
    """Samples x ~ N(μ, σ²) of class 0: at weights of 0 a sample's gradient is ±x / 2."""

    num_train, num_eval, num_classes = BATCH * STEPS, 4, 2
    mixes_pairs = False

    def __init__(self):
        self.unreadable = []
        self.identity = made_identity("noisy", self.num_train, 4, 2)
        draw = np.random.default_rng(7)
        mean = np.full(DIM, DISTANCE / math.sqrt(DIM))
        x = mean + DEVIATION * draw.standard_normal((self.num_train, DIM))
        self.images = torch.from_numpy(x).float().view(-1, 1, 1, DIM)

    def train_batch(self, epoch, indices):
        return self.images[indices], torch.zeros(len(indices), dtype=torch.int64)

    def on_device(self, images, labels, request):
        return images, labels


# Two rows of ∓x / 2: |G|² = 2 |μ|² / 4, S = 2 · dim · σ² / 4.
SIGNAL, TRACE = DISTANCE**2 / 2, DIM * DEVIATION**2 / 2


def noisy_trainer(comm, micro_batch, placed, precision="fp32"):
    model, source = Quadratic(), Noisy()
    placement = placed(model.parameters(), comm, bucket_bytes=700, early_norms=True)
    optimizer = LARS(model.parameters(), lr=0.0, placement=placement)
    return Trainer(
        RunState(model, optimizer),
        placement,
        Feed(source, GlobalBatches(source.num_train, BATCH, seed=5), comm, torch.device("cpu"),
             micro_batch, STEPS),
        lambda step: 0.0,
        comm,
        StepOptions(precision=precision, noise_every=2),
    )  # fmt: skip


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(
    ("micro_batch", "placed", "precision"),
    [(24, Replicated, "fp32"), (6, Replicated, "fp16"), (4, Sharded, "fp32"), (1, Sharded, "fp32")],
)
def test_the_estimates_of_a_known_gradient_are_unbiased(comm, micro_batch, placed, precision):
    """At fixed weights; means over the steps lie within four standard errors of the truth."""
    trainer = noisy_trainer(comm, micro_batch, placed, precision)
    batches = trainer.feed.from_step(0)
    found = []
    for _ in range(STEPS):
        trainer.train_step(batches)
        found += [outcome.noise for outcome in trainer.outcomes()]
    if comm.size == 1 and micro_batch == BATCH:
        assert found == [None] * STEPS, "one gradient alone has no spread"
        return
    assert [noise is None for noise in found] == [True, False] * (STEPS // 2)
    for name, wanted in (("trace", TRACE), ("signal", SIGNAL)):
        values = np.array([getattr(noise, name) for noise in found if noise is not None])
        error = values.std(ddof=1) / math.sqrt(len(values))
        assert abs(values.mean() - wanted) < 4 * error, name
        assert error < 0.25 * wanted, f"{name}: the interval says something"
    noise = found[-1]
    assert sum(noise.traces.values()) == noise.trace
    last = [noise for noise in found if noise is not None][-10:]
    wanted = sum(noise.trace for noise in last) / sum(noise.signal for noise in last)
    assert trainer.state.progress.critical_batch == pytest.approx(wanted)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_it_changes_no_bit_of_the_training_and_is_recorded(comm, placed, tmp_path):
    """Uneven parts, a rank whose micro-batches differ, several buckets."""
    folder = comm.broadcast_object(tmp_path)
    ends, path = [], folder / "layers.jsonl"
    for every in (0, 2):
        trainer = tiny_trainer(comm, torch.float64, 5, placed=placed, noise_every=every)
        sinks = [JsonLines(path, ("layers", "train"))] if every and comm.rank == 0 else []
        tiny_loop(trainer, folder / str(every), {"layers": every, "log": 2}, sinks=sinks).run()
        ends.append({name: t.clone() for name, t in trainer.state.tensors().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    if comm.rank == 0:
        records = list(map(json.loads, path.read_text().splitlines()))
        layers = [record for record in records if record["kind"] == "layers"]
        assert len(layers) == 4
        assert layers[0]["noise_trace"].keys() == layers[0]["weight_norm"].keys()
        assert all(sum(record["noise_trace"].values()) > 0 for record in layers)
        assert records[-1].get("critical_batch") == trainer.state.progress.critical_batch
    comm.barrier()
