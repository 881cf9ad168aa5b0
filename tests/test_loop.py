"""Steps that are left out, checkpoints beside training, and agreement to stop."""

import pytest
import torch
from tiny import tiny_loop, tiny_trainer

from hvd_lars.checkpoint import Checkpointer
from hvd_lars.errors import UserError
from hvd_lars.progress import Progress
from hvd_lars.replicas import named_state, verify_agreement
from hvd_lars.stopping import StopRequests

pytestmark = pytest.mark.ranks(1, 2, 3)


class Records(list):
    """A sink that remembers."""

    write = list.append

    def close(self):
        pass


def with_bad_images(trainer, comm, steps):
    """Let one rank's images be NaN in some steps."""
    take = trainer.source.train_batch

    def train_batch(epoch, indices):
        images, labels = take(epoch, indices)
        if comm.rank == comm.size - 1 and trainer.progress.step in steps:
            images = images * torch.nan
        return images, labels

    trainer.source.train_batch = train_batch


@pytest.mark.parametrize("norm", [False, True])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(comm, tmp_path, norm):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float64, 16, norm=norm)
    with_bad_images(trainer, comm, {2, 3})
    records = Records()
    states = []
    take = trainer.train_step

    def remembering(step, batches):
        states.append({n: t.clone() for n, t in named_state(trainer.model).items()})
        return take(step, batches)

    trainer.train_step = remembering
    tiny_loop(trainer, folder, sinks=[records]).run()
    counters = [name for name in states[2] if "num_batches" in name]
    for name in states[2]:
        assert torch.equal(states[2][name], states[4][name]) or name in counters, name
    assert any(not torch.equal(states[4][name], states[5][name]) for name in states[4])
    assert trainer.progress.skipped_steps == 2
    skipped = [r["step"] for r in records if r.get("event") == "skipped"]
    assert skipped == [3, 4]
    losses = [r["loss"] for r in records if r["kind"] in ("train", "eval")]
    assert torch.tensor(losses).isfinite().all()
    state = named_state(trainer.model, trainer.optimizer)
    assert all(tensor.isfinite().all() for tensor in state.values())
    verify_agreement(state, comm)


def test_too_many_in_a_row_end_the_run_and_name_the_layer(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    with_bad_images(trainer, comm, set(range(2, 8)))
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 5, .* first in 0.weight;"):
        tiny_loop(trainer, folder, max_skipped_steps=2).run()
    other = tiny_trainer(comm, torch.float32, 16, seed=4)
    assert Checkpointer(folder, comm).restore(other.model, other.optimizer).step == 5
    assert all(tensor.isfinite().all() for tensor in other.model.state_dict().values())


def test_a_checkpoint_that_cannot_be_written_beside_training_is_told_and_forgotten(
    comm, tmp_path, capfd
):
    folder = comm.broadcast_object(tmp_path) / "checkpoints"
    trainer = tiny_trainer(comm, torch.float32, 16)
    checkpointer = Checkpointer(folder, comm)
    checkpointer.save(trainer.model, trainer.optimizer, Progress(step=1), beside=True)
    checkpointer.finish()
    if comm.rank == 0:
        folder.rename(folder.with_name("aside"))
        folder.write_text("a file where the folder was")
    comm.barrier()
    checkpointer.save(trainer.model, trainer.optimizer, Progress(step=2), beside=True)
    failure = checkpointer.finish()
    assert (failure is not None) == (comm.rank == 0)
    if comm.rank == 0:
        assert "the run goes on" in capfd.readouterr().err
        folder.unlink()
        folder.with_name("aside").rename(folder)
    comm.barrier()
    assert checkpointer.restore(trainer.model, trainer.optimizer).step == 1


def test_the_newest_and_the_best_are_kept(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    checkpointer = Checkpointer(folder, comm, keep_last=2)
    for step, top1 in ((1, 0.2), (2, 0.7), (3, None), (4, 0.6), (5, 0.1)):
        checkpointer.save(trainer.model, trainer.optimizer, Progress(step=step, top1=top1))
    assert sorted(p.name for p in folder.glob("step-*")) == [
        "step-00000002", "step-00000004", "step-00000005"
    ]  # fmt: skip
    comm.barrier()


def test_all_ranks_stop_at_the_step_that_one_was_asked_in(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    if comm.rank == 0:
        (folder / "STOP").touch()
    comm.barrier()
    stops = StopRequests(folder / "STOP" if comm.rank == comm.size - 1 else None)
    trainer = tiny_trainer(comm, torch.float32, 16)
    summary = tiny_loop(trainer, folder, stops=stops).run()
    assert summary.stopped == "STOP file"
    assert trainer.progress.step == 1
    assert summary.checkpoint == folder / "step-00000001"


def test_a_stop_in_the_middle_of_an_evaluation_leaves_it_for_later(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    whole, part = Records(), Records()
    tiny_loop(tiny_trainer(comm, torch.float64, 16), folder / "whole", sinks=[whole]).run()
    trainer = tiny_trainer(comm, torch.float64, 16)
    loop = tiny_loop(trainer, folder / "part", sinks=[part])
    evaluate = trainer.source.eval_batch

    def eval_batch(indices):
        if comm.rank == 0:
            loop.stops._asked.add("SIGTERM")
        return evaluate(indices)

    trainer.source.eval_batch = eval_batch
    assert loop.run().stopped == "SIGTERM"
    assert trainer.progress.step == 4
    assert trainer.progress.evaluation_due
    other = tiny_trainer(comm, torch.float64, 16, seed=7)
    loop = tiny_loop(other, folder / "part", sinks=[part])
    loop.resume(loop.checkpointer.restore(other.model, other.optimizer))
    assert loop.run().stopped is None
    plain = [
        [{k: v for k, v in r.items() if "second" not in k} for r in rows if r["kind"] != "event"]
        for rows in (whole, part)
    ]
    assert plain[0] == plain[1]
