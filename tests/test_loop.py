"""Skipped steps, checkpoints in the background, and agreement to stop."""

import os
import signal

import numpy as np
import pytest
import torch
from tiny import assert_same_parameters, one_device, tiny_evaluator, tiny_loop, tiny_trainer

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.data.source import Unreadable
from hvd_lars.errors import UserError
from hvd_lars.health.agreement import Agreement
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.optim import Replicated, Sharded
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import ReplicasDifferError, verify_agreement
from hvd_lars.state.run_state import RunState

pytestmark = pytest.mark.ranks(1, 2, 3, gloo=(2,))


class Records(list):
    """A sink that remembers."""

    write = list.append

    def close(self):
        pass


def with_bad_images(trainer, comm, steps):
    """Let one rank's images be NaN in some steps."""
    take = trainer.feed.source.train_batch

    def train_batch(epoch, indices):
        images, labels = take(epoch, indices)
        if comm.rank == comm.size - 1 and trainer.state.progress.step in steps:
            images = images * torch.nan
        return images, labels

    trainer.feed.source.train_batch = train_batch


@pytest.mark.parametrize("placed", [Replicated, Sharded])
@pytest.mark.parametrize(
    ("norm", "precision", "late"),
    [
        (False, "fp32", False),
        (True, "fp32", True),
        (True, "fp16", False),
        (True, "fp16", True),
        (True, "bf16", False),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(
    comm, tmp_path, norm, precision, late, placed
):
    """Whatever it touched is as before: weights, running statistics, the average, momentum."""
    folder = comm.broadcast_object(tmp_path)
    dtype = torch.float64 if precision == "fp32" else torch.float32
    options = {"norm": norm, "precision": precision, "placed": placed, "ema": 0.5, "late": late}
    trainer = tiny_trainer(comm, dtype, 16, **options)
    with_bad_images(trainer, comm, {1, 2})
    records = Records()
    states = []
    take = trainer.train_step

    def remembering(batches):
        trainer.placement.complete_parameters()
        state = trainer.state.tensors()
        states.append({n: t.clone() for n, t in state.items()})
        return take(batches)

    trainer.train_step = remembering
    tiny_loop(trainer, folder, sinks=[records]).run()
    for name in states[1]:
        assert torch.equal(states[1][name], states[3][name]), name
    assert len(states[1]) == 3 * len(list(trainer.model.parameters())) + 1 + 2 * len(
        list(trainer.model.buffers())
    )
    assert any(not torch.equal(states[3][name], states[4][name]) for name in states[3])
    assert trainer.state.progress.skipped_steps == 2
    skipped = [r["step"] for r in records if r.get("event") == "skipped"]
    assert skipped == [2, 3]
    losses = [r["loss"] for r in records if r["kind"] in ("train", "eval")]
    assert torch.tensor(losses).isfinite().all()
    state = trainer.state.tensors()
    assert all(tensor.isfinite().all() for tensor in state.values())
    verify_agreement(state, comm)
    if precision == "fp16":
        assert trainer.loss_scale.value == 2.0**14


@pytest.mark.parametrize("late", [False, True])
def test_a_diverged_run_in_float16_ends_as_one_in_float32_does(comm, tmp_path, late):
    """Its loss is not finite, which no scale of the loss mends."""
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(
        comm, torch.float32, 16, norm=True, precision="fp16", max_skipped_steps=2, late=late
    )
    with_bad_images(trainer, comm, set(range(2, 8)))
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 5, .* first in 0.weight;"):
        tiny_loop(trainer, folder).run()


def overflowing(trainer, largest):
    """Let gradients overflow as long as the loss is scaled by more than ``largest``."""
    step = trainer.optimizer.step

    def overflow(**options):
        if options["loss_scale"] > largest:
            trainer.placement.gradients.buckets[0].flat.fill_(torch.inf)
        step(**options)

    trainer.optimizer.step = overflow


@pytest.mark.parametrize("late", [False, True])
def test_a_scale_that_is_too_large_at_first_ends_no_run(comm, tmp_path, late):
    folder = comm.broadcast_object(tmp_path)
    options = {"precision": "fp16", "max_skipped_steps": 0, "late": late}
    trainer = tiny_trainer(comm, torch.float32, 16, **options)
    overflowing(trainer, 2.0**10)
    tiny_loop(trainer, folder).run()
    assert trainer.state.progress.skipped_steps == 6
    assert trainer.loss_scale.value == 2.0**10


def test_gradients_that_overflow_at_any_scale_end_the_run(comm, tmp_path):
    """The scale has a floor, where steps that are left out count."""
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16, precision="fp16", max_skipped_steps=2)
    trainer.state.restored(Progress(loss_scale=4.0))
    overflowing(trainer, 0.0)
    with pytest.raises(UserError, match="all 5 steps had gradients that are not finite"):
        tiny_loop(trainer, folder).run()
    assert trainer.loss_scale.value == 1.0


def test_a_run_of_which_no_step_could_be_taken_is_not_done(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    with_bad_images(trainer, comm, set(range(8)))
    with pytest.raises(UserError, match="all 8 steps had gradients that are not finite"):
        tiny_loop(trainer, folder).run()


def test_too_many_in_a_row_end_the_run_and_name_the_layer(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16, max_skipped_steps=2)
    with_bad_images(trainer, comm, set(range(2, 8)))
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 5, .* first in 0.weight;"):
        tiny_loop(trainer, folder).run()
    other = tiny_trainer(comm, torch.float32, 16, seed=4)
    Checkpointer(folder, comm).restore(other.state)
    assert other.state.progress.step == 5
    assert all(tensor.isfinite().all() for tensor in other.model.state_dict().values())


def test_a_checkpoint_that_cannot_be_written_beside_training_is_told_and_forgotten(
    comm, tmp_path, capfd
):
    folder = comm.broadcast_object(tmp_path) / "checkpoints"
    trainer = tiny_trainer(comm, torch.float32, 16)
    checkpointer = Checkpointer(folder, comm)
    trainer.state.restored(Progress(step=1))
    checkpointer.save(trainer.state, background=True)
    checkpointer.finish()
    if comm.rank == 0:
        folder.rename(folder.with_name("aside"))
        folder.write_text("a file where the folder was")
    comm.barrier()
    trainer.state.restored(Progress(step=2))
    checkpointer.save(trainer.state, background=True)
    failure = checkpointer.finish()
    assert (failure is not None) == (comm.rank == 0)
    if comm.rank == 0:
        assert "the run continues" in capfd.readouterr().err
        folder.unlink()
        folder.with_name("aside").rename(folder)
    comm.barrier()
    checkpointer.restore(trainer.state)
    assert trainer.state.progress.step == 1


def test_the_newest_and_the_best_are_kept(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    checkpointer = Checkpointer(folder, comm, keep_last=2)
    for step, top1 in ((1, 0.2), (2, 0.7), (3, None), (4, 0.6), (5, 0.1)):
        trainer.state.restored(Progress(step=step, top1=top1))
        checkpointer.save(trainer.state)
    assert sorted(p.name for p in folder.glob("step-*")) == [
        "step-00000002", "step-00000004", "step-00000005"
    ]  # fmt: skip
    comm.barrier()


def test_without_an_evaluation_the_newest_are_kept(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    checkpointer = Checkpointer(folder, comm, keep_last=2)
    for step in (1, 2, 3, 4):
        trainer.state.restored(Progress(step=step))
        checkpointer.save(trainer.state)
    assert [p.name for p in sorted(folder.glob("step-*"))] == ["step-00000003", "step-00000004"]
    comm.barrier()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outcomes_read_late_change_no_bit_nor_record(comm, tmp_path, precision):
    """Checkpoints, log lines and evaluations fall between and on the steps that are skipped."""
    ends = []
    for late in (False, True):
        folder = comm.broadcast_object(tmp_path / str(late))
        options = {"norm": True, "ema": 0.5, "precision": precision, "late": late}
        trainer = tiny_trainer(comm, torch.float32, 16, **options)
        with_bad_images(trainer, comm, {1, 4})
        records = Records()
        every = {"total": 8, "evaluate": 4, "log": 3, "checkpoint": 5}
        tiny_loop(trainer, folder, every, sinks=[records]).run()
        saved = RunState(trainer.model, trainer.optimizer, trainer.state.average)
        Checkpointer(folder, comm).restore(saved)
        told = [
            {k: v for k, v in r.items() if "second" not in k and k not in ("hosts", "path")}
            for r in records
        ]
        state = {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
        ends.append((state, trainer.state.progress, saved.progress, told))
    (state, *rest), (late_state, *late_rest) = ends
    assert all(torch.equal(late_state[name], state[name]) for name in state)
    assert late_rest == rest


def test_a_request_to_stop_that_is_read_late_stops_a_step_later_with_its_state_saved(
    comm, tmp_path
):
    folder = comm.broadcast_object(tmp_path)
    if comm.rank == 0:
        (folder / "STOP").touch()
    comm.barrier()
    stops = StopRequests(folder / "STOP" if comm.rank == comm.size - 1 else None)
    trainer = tiny_trainer(comm, torch.float32, 16, late=True)
    summary = tiny_loop(trainer, folder, agreement=Agreement(comm, stops)).run()
    assert (summary.stopped, trainer.state.progress.step) == ("STOP file", 2)
    other = tiny_trainer(comm, torch.float32, 16, seed=4)
    Checkpointer(folder, comm).restore(other.state)
    assert other.state.progress == trainer.state.progress


def test_all_ranks_stop_at_the_step_that_one_was_asked_in(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    if comm.rank == 0:
        (folder / "STOP").touch()
    comm.barrier()
    stops = StopRequests(folder / "STOP" if comm.rank == comm.size - 1 else None)
    trainer = tiny_trainer(comm, torch.float32, 16)
    summary = tiny_loop(trainer, folder, agreement=Agreement(comm, stops)).run()
    assert summary.stopped == "STOP file"
    assert trainer.state.progress.step == 1
    assert summary.checkpoint == folder / "step-00000001"


def test_rank_0s_clock_says_when_a_checkpoint_is_due(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    records = Records()
    agreement = Agreement(comm, checkpoint_seconds=0.0 if comm.rank == 0 else 1e9)
    tiny_loop(trainer, folder, agreement=agreement, sinks=[records]).run()
    kept = [r["step"] for r in records if r.get("event") == "checkpoint"]
    assert kept == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not Agreement(comm, checkpoint_seconds=3600.0).decide().checkpoint


def test_a_bad_image_is_told_once_whichever_ranks_meet_it(comm, capfd):
    bad = [Unreadable("a.png: empty", True), Unreadable(f"{comm.rank}.png: empty", False)]
    mine = list(bad)
    agreement = Agreement(comm, None, mine, num_train=100, num_eval=20, max_bad_fraction=0.05)
    assert agreement.decide().unreadable == (
        *(Unreadable("0.png: empty", False), bad[0]),
        *(Unreadable(f"{rank}.png: empty", False) for rank in range(1, comm.size)),
    )
    said = capfd.readouterr().err
    if comm.rank == 0:
        assert said.count("a.png: empty: not evaluated") == 1
        assert said.count("0.png: empty: another takes its place") == 1
    assert agreement.decide().unreadable == ()
    mine.append(bad[0])
    assert agreement.decide().unreadable == ()
    if comm.rank == comm.size - 1:
        mine.append(Unreadable("more.png: empty", True))  # two of 20, though not of 120
    with pytest.raises(UserError, match="max_bad_fraction: 2 of 20 test images .* as more.png"):
        agreement.decide()


@pytest.mark.parametrize("bad", [1, 20, 37])
def test_only_images_that_were_read_are_measured(comm, bad):
    """Whichever ranks meet those that cannot be read, and however they are cut into batches."""
    trainer = tiny_trainer(comm, torch.float64, 16)
    source, model = trainer.feed.source, trainer.model
    take = source.eval_batch

    def eval_batch(indices):
        return take(indices[indices >= bad])

    source.eval_batch = eval_batch
    asked = []
    evaluate = tiny_evaluator(trainer, 4).evaluate
    if bad == source.num_eval:
        with pytest.raises(UserError, match="none of the 37 test images can be read"):
            evaluate(model)
        return
    found = evaluate(model, lambda: bool(asked.append(1)))
    images, labels = take(np.arange(bad, 37))
    with torch.no_grad():
        logits = model(images)
    assert found.num_samples == 37 - bad
    assert found.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found.means["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item()
    )
    assert len(asked) == -(-37 // (4 * comm.size)) + 1  # after the last batch, too


def test_a_stop_in_the_middle_of_an_evaluation_leaves_it_for_later(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    whole, part = Records(), Records()
    tiny_loop(tiny_trainer(comm, torch.float64, 16), folder / "whole", sinks=[whole]).run()
    trainer = tiny_trainer(comm, torch.float64, 16)
    loop = tiny_loop(trainer, folder / "part", sinks=[part])
    evaluate = trainer.feed.source.eval_batch

    def eval_batch(indices):
        if comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(indices)

    trainer.feed.source.eval_batch = eval_batch
    with loop.agreement.stops.listening():
        assert loop.run().stopped == "SIGTERM"
    assert trainer.state.progress.step == 4
    assert trainer.state.progress.evaluation_due
    other = tiny_trainer(comm, torch.float64, 16, seed=7)
    loop = tiny_loop(other, folder / "part", sinks=[part])
    loop.checkpointer.restore(other.state)
    assert loop.run().stopped is None
    plain = [
        [{k: v for k, v in r.items() if "second" not in k} for r in rows if r["kind"] != "event"]
        for rows in (whole, part)
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_one_rank_and_many_take_a_run_over_from_each_other(
    comm, tmp_path, dtype, tolerance, placed
):
    """Steps 0 to 3 by one rank, 3 to 6 by all of them, 6 to 8 by one again."""
    folder = comm.broadcast_object(tmp_path)
    reference, _ = one_device(dtype)
    alone = LocalCommunicator()
    for ranks, first, last in ((alone, 0, 3), (comm, 3, 6), (alone, 6, 8)):
        # Every rank makes the same placements, whose names Horovod goes by.
        trainer = tiny_trainer(ranks, dtype, 16, seed=first, placed=placed)
        checkpointer = Checkpointer(folder, ranks)
        if first:
            checkpointer.restore(trainer.state)
        for step in range(first, last):
            trainer.train_step(trainer.feed.from_step(step))
        if last < 8 and (ranks is comm or comm.rank == 0):
            trainer.state.restored(Progress(step=last))
            checkpointer.save(trainer.state)
        comm.barrier()
    assert_same_parameters(trainer.model, reference, tolerance)


def test_replicas_that_part_are_named_at_the_next_comparison(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    tiny_loop(tiny_trainer(comm, torch.float32, 16), folder / "well", {"verify": 1}).run()
    trainer = tiny_trainer(comm, torch.float32, 16)
    take = trainer.train_step

    def flipping(batches):
        loss = take(batches)
        if trainer.state.progress.step == 5 and comm.rank == comm.size - 1:
            with torch.no_grad():
                trainer.model[2].bias[1] += 1e-6
        return loss

    trainer.train_step = flipping
    loop = tiny_loop(trainer, folder / "badly", {"verify": 3})
    if comm.size == 1:
        loop.run()
        return
    with pytest.raises(
        ReplicasDifferError, match=rf"differs from rank 0's on ranks \[.*{comm.size - 1}"
    ):
        loop.run()
    assert trainer.state.progress.step == 6
