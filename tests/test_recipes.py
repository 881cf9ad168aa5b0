"""Every kind of bundled config takes a few steps, small, over two ranks."""

import gc
import json
import os
import re

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from hvd_lars.assemble.run import build_run
from hvd_lars.comm import detect_launch
from hvd_lars.config.file import bundled_configs, load_config
from hvd_lars.state.replicas import verify_agreement

STEPS = 3  # a warmup from 0 and a zero-initialised gamma each hold a branch still for one step


def tiny_overrides(name, folder):
    config = load_config(name)
    overrides = ["train.global_batch=4", "train.micro_batch=2", f"train.duration={STEPS} steps"]
    overrides += ["train.eval_every=1 steps", "checkpoint.every=1 steps", f"run.dir={folder}"]
    overrides += ["run.expect_world_size=2"]
    if config.schedule.warmup != "none":
        overrides.append("schedule.warmup_duration=1 steps")
    if config.schedule.milestones:
        overrides.append("schedule.milestones=['1 steps']")
    if config.data.name not in ("digits", "glyphs"):
        side = {"alexnet": 227, "resnet5": 32, "resnet1": 32}[config.model.name[:7]]
        fields = f"image_size: {side}, num_train: 16, num_eval: 4, num_classes: 10"
        overrides.append(f"data={{name: synthetic, {fields}}}")
    return overrides


def kinds():
    """A recipe of each kind: others differ from one of these in numbers alone."""
    found = {}
    for name in bundled_configs():
        config = load_config(name).model_dump(mode="json", exclude={"run", "recipe", "extends"})
        found.setdefault(json.dumps(without_numbers(config)), name)
    return sorted(found.values())


def without_numbers(tree):
    """The tree with every number replaced by whether it is 0, and durations by their unit."""
    if isinstance(tree, dict):
        return {key: without_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_numbers(value) for value in tree[:1]]
    if isinstance(tree, str):
        return re.sub(r"[\d.]+", "#", tree) if " " in tree else tree
    return bool(tree) if isinstance(tree, (int, float)) else tree


@pytest.fixture(autouse=True)
def _collected():
    """A trainer's parts refer to each other: 36 of them would fill 16 GB before Python looks."""
    yield
    gc.collect()


@pytest.mark.ranks(2, horovod=(2,), mpi=())
@pytest.mark.parametrize("name", kinds())
def test_takes_steps(comm, name, tmp_path_factory):
    folder = comm.broadcast_object(str(tmp_path_factory.mktemp("run") / "run"))
    config = load_config(name, tiny_overrides(name, folder))
    loop, _ = build_run(config, comm, detect_launch(os.environ))
    torch.set_num_threads(1)
    trainer = loop.trainer
    for sink in loop.recorder.sinks:
        sink.close()
    before = parameters_to_vector(trainer.model.parameters()).clone()
    batches = trainer.feed.from_step(0)
    for _ in range(STEPS):
        loss = trainer.train_step(batches)
        comm.start_all_reduce_sum(loss, "loss").wait()
        assert torch.isfinite(loss) and loss > 0.0
    assert not torch.equal(before, parameters_to_vector(trainer.model.parameters()))
    for name, param in trainer.model.named_parameters():
        assert trainer.optimizer.state[param]["momentum_buffer"].any(), name
    parameters = trainer.state.tensors()
    parameters = {name: t for name, t in parameters.items() if "running_" not in name}
    verify_agreement(parameters, comm)
