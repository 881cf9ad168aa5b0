"""A run that is resumed sends its state to the ranks once, and checks it once."""

import os

import pytest
import torch

from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.run import build_run
from hvd_lars.comm import detect_launch
from hvd_lars.config.file import load_config
from hvd_lars.state import replicas

pytestmark = pytest.mark.ranks(2, 3, mpi=(2,))
STEPS = [
    "train.global_batch=64", "schedule.warmup_duration=1 steps", "train.threads=1",
    "checkpoint.every=2 steps", "train.eval_every=100 steps", "run.console=none",
]  # fmt: skip


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_the_state_is_broadcast_and_hashed_once(comm, tmp_path, monkeypatch, placement):
    folder = comm.broadcast_object(str(tmp_path / "run"))
    options = [*STEPS, f"run.dir={folder}", f"optimizer.placement={placement}"]
    launch = detect_launch(os.environ)
    config = load_config("digits", [*options, "train.duration=2 steps"])
    build_run(config, comm, launch)[0].run()

    sent, hashed = [], []
    broadcast, verify = type(comm).broadcast, replicas.verify_agreement

    def counting(self, tensor, root=0):
        sent.append(tensor.numel() * tensor.element_size())
        broadcast(self, tensor, root)

    def checking(state, comm):
        hashed.append(len(state))
        verify(state, comm)

    monkeypatch.setattr(type(comm), "broadcast", counting)
    monkeypatch.setattr(replicas, "verify_agreement", checking)
    config = load_config("digits", [*options, "train.duration=4 steps"])
    loop, _ = build_run(config, comm, launch, Resume(None, ("train.duration",)))
    tensors = loop.state.tensors()
    loop.run()
    whole = sum(t.numel() * t.element_size() for t in tensors.values())
    checksums = 8 * len(tensors)
    assert whole <= sum(sent) <= whole + 2 * checksums
    assert hashed == [len(tensors)]
    assert loop.state.progress.step == 4
    assert torch.get_num_threads() == 1
