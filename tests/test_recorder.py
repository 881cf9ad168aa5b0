"""What a run records of its layers and its ranks."""

import json
import socket
import time

import numpy as np
import pytest
import torch
from test_loop import Records, with_bad_images
from tiny import GLOBAL_BATCH, RATES, TinySource, tiny_loop, tiny_model, tiny_trainer
from torch import nn

from hvd_lars import LARS, parameter_groups
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.metrics import JsonLines
from hvd_lars.optim import Replicated, Sharded
from hvd_lars.train.recorder import hosts_of

pytestmark = pytest.mark.ranks(1, 2, 3)


def norms_of_one_device():
    """By step and name: ‖w‖ before the step, ‖g‖, and λ by the paper's formula."""
    model = tiny_model(torch.float64)
    names = {param: name for name, param in model.named_parameters()}
    optimizer = LARS(parameter_groups(model, 5e-3, adapt="weights"), trust_coefficient=0.02)
    source = TinySource(torch.float64)
    batches = GlobalBatches(source.num_train, GLOBAL_BATCH, seed=5)
    for step, rate in enumerate(RATES):
        optimizer.zero_grad()
        images, labels = source.train_batch(0, np.asarray(batches.indices(step)))
        nn.functional.cross_entropy(model(images), labels).backward()
        found = {}
        for group in optimizer.param_groups:
            group["lr"] = rate
            for param in group["params"]:
                w, g = param.detach().norm().item(), param.grad.norm().item()
                ratio = 0.02 * w / (g + group["weight_decay"] * w)
                found[names[param]] = (w, g, ratio if group["adapt"] == "own" else 1.0)
        yield step + 1, rate, found
        optimizer.step()


@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_layers_are_recorded_as_one_device_has_them(comm, tmp_path, placed):
    folder, records = comm.broadcast_object(tmp_path), Records()
    trainer = tiny_trainer(comm, torch.float64, 16, placed=placed)
    sinks = [records] if comm.rank == 0 else []
    tiny_loop(trainer, folder, every={"layers": 2}, sinks=sinks).run()
    found = {r["step"]: r for r in records if r["kind"] == "layers"}
    if comm.rank != 0:
        assert found == {}
        return
    assert sorted(found) == [2, 4, 6, 8]
    for step, rate, wanted in norms_of_one_device():
        if step not in found:
            continue
        record = found[step]
        assert record["lr"] == rate
        assert record["weight_norm"].keys() == wanted.keys()
        for name, (weight, gradient, ratio) in wanted.items():
            assert record["weight_norm"][name] == pytest.approx(weight, rel=1e-9)
            assert record["gradient_norm"][name] == pytest.approx(gradient, rel=1e-9)
            assert record["trust_ratio"][name] == pytest.approx(ratio, rel=1e-9)
            assert record["rate"][name] == pytest.approx(rate * ratio, rel=1e-9)


def test_layers_of_a_step_that_was_left_out_are_recorded(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float64, 16)
    with_bad_images(trainer, comm, {1})
    path = tmp_path / "layers.jsonl"
    sinks = [JsonLines(path, ("layers",))] if comm.rank == 0 else []
    tiny_loop(trainer, folder, every={"layers": 2}, sinks=sinks).run()
    assert trainer.state.progress.skipped_steps == 1
    if comm.rank == 0:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["step"] for record in records] == [2, 4, 6, 8]
        assert None in records[0]["gradient_norm"].values()
        assert None not in records[1]["gradient_norm"].values()


def test_a_slow_rank_is_named_once(comm, tmp_path, capsys):
    folder, records = comm.broadcast_object(tmp_path), Records()
    trainer = tiny_trainer(comm, torch.float64, 16)
    take, slow = trainer.feed.source.train_batch, comm.size - 1

    def train_batch(epoch, indices):
        if comm.rank == slow and comm.size > 1:
            time.sleep(0.2)
        return take(epoch, indices)

    trainer.feed.source.train_batch = train_batch
    tiny_loop(trainer, folder, {"log": 1}, sinks=[records]).run()
    told = [r for r in records if r.get("event") == "straggler" and r["rank"] == slow]
    assert len(told) == (comm.size > 1)
    windows = [r for r in records if r["kind"] == "train"]
    if comm.size == 1:
        assert "rank_data_seconds" not in windows[0]
        return
    assert told[0]["step"] == 3
    assert told[0]["host"] == socket.gethostname()
    assert f"rank {slow} on {socket.gethostname()} takes" in capsys.readouterr().err
    for window in windows:
        assert len(window["rank_data_seconds"]) == len(window["rank_busy_seconds"]) == comm.size
        assert window["rank_data_seconds"][slow] >= 0.2


def test_hosts_are_known_by_rank(comm):
    assert hosts_of(comm) == [socket.gethostname()] * comm.size
