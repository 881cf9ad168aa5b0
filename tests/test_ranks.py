"""Several ranks compute what one device computes."""

import pytest
import torch
from tiny import (
    GLOBAL_BATCH,
    RATES,
    assert_same_parameters,
    one_device,
    tiny_evaluator,
    tiny_loop,
    tiny_model,
    tiny_trainer,
)

from hvd_lars.data.sampler import accumulation
from hvd_lars.optim import LARS, Replicated, parameter_groups
from hvd_lars.optim.distributed import bucket
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import (
    ReplicasDifferError,
    average_buffers,
    broadcast_and_verify,
    verify_agreement,
)
from hvd_lars.state.run_state import RunState

pytestmark = pytest.mark.ranks(1, 2, 3, 4)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def micro_batch_for(comm, pieces):
    """The micro-batch size that cuts a step into ``pieces``."""
    fullest = -(-GLOBAL_BATCH // comm.size)
    micro_batch = -(-fullest // pieces)
    assert accumulation(GLOBAL_BATCH, comm.size, micro_batch) == pieces
    return micro_batch


@pytest.mark.parametrize(
    ("dtype", "pieces"), [(torch.float64, 1), (torch.float32, 2), (torch.float64, 5)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"denominator": "combined"},
        {"lr_position": "update", "nesterov": True},
        {"adapt": "layer", "zero_norm": "skip"},
        {"adapt": "all", "trust_clip": True, "eps": 1e-5},
        {"adapt": "none", "momentum": 0.0},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "paper",
)
def test_ranks_times_accumulation_equal_one_device(comm, dtype, pieces, options):
    trainer = tiny_trainer(comm, dtype, micro_batch_for(comm, pieces), **options)
    for step in range(len(RATES)):
        trainer.train_step(trainer.feed.from_step(step))
        verify_agreement(trainer.state.tensors(), comm)
    reference, reference_optimizer = one_device(dtype, **options)
    assert_same_parameters(trainer.model, reference, TOLERANCE[dtype])
    wanted = RunState(reference, reference_optimizer).tensors()
    found = trainer.state.tensors()
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].norm() + 1e-30
        assert (found[name] - wanted[name]).norm() / scale < 30 * TOLERANCE[dtype], name


def test_the_same_ranks_end_with_the_same_bits_every_time(comm, monkeypatch):
    """Whether gradients are copied one by one, some at a time, or a whole bucket's together."""
    ends = []
    for together in (0, 100, 2**20):
        monkeypatch.setattr(bucket, "_CACHED", together)
        trainer = tiny_trainer(comm, torch.float32, 7)
        for step in range(len(RATES)):
            trainer.train_step(trainer.feed.from_step(step))
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_gradients_set_to_none_and_unused_parameters_are_reduced(comm):
    model = tiny_model(torch.float64)
    unused = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    placement = Replicated([*model.parameters(), unused], comm, bucket_bytes=500)
    for param in model.parameters():
        param.grad = None
    images = torch.full((1, 3, 6, 6), 0.5 + comm.rank, dtype=torch.float64)
    model(images).sum().backward()
    placement.gradients.finish()

    reference = tiny_model(torch.float64)
    for rank in range(comm.size):
        reference(torch.full((1, 3, 6, 6), 0.5 + rank, dtype=torch.float64)).sum().backward()
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(unused.grad, torch.zeros(4, dtype=torch.float64))


def test_reducing_twice_does_not_sum_twice(comm):
    model = tiny_model(torch.float64)
    placement = Replicated(model.parameters(), comm)
    model(torch.ones(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    placement.gradients.finish()
    once = [p.grad.clone() for p in model.parameters()]
    placement.gradients.finish()
    for param, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(param.grad, gradient)


def test_backward_returns_with_the_sums(comm):
    model = tiny_model(torch.float64)
    placement = Replicated(model.parameters(), comm, bucket_bytes=500)
    images = torch.ones(1, 3, 6, 6, dtype=torch.float64)
    model(images).sum().backward()
    assert placement.gradients.steps == 0
    reference = tiny_model(torch.float64)
    reference(images).sum().backward()
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, comm.size * wanted.grad, rtol=1e-12, atol=1e-12)


def test_a_second_backward_outside_no_sync_is_refused(comm):
    model = tiny_model(torch.float32)
    placement = Replicated(model.parameters(), comm)
    images = torch.ones(1, 3, 6, 6)
    model(images).sum().backward()
    with pytest.raises(RuntimeError, match="no_sync"):
        model(images).sum().backward()
    placement.gradients.zero()  # a step that is given up
    model(images).sum().backward()
    reference = tiny_model(torch.float32)
    reference(images).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, comm.size * reference[0].bias.grad)


def test_a_rank_without_samples_joins_in_the_step(comm):
    """And gradients may be forgotten through the model: they are None on the idle ranks."""
    model, reference = tiny_model(torch.float64), tiny_model(torch.float64)
    placement = Replicated(model.parameters(), comm)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=1.0, placement=placement)
    plain = LARS(parameter_groups(reference, 5e-3), lr=1.0)
    for step in range(4):
        images = torch.full((1, 3, 6, 6), 1.0 + step, dtype=torch.float64)
        model.zero_grad()
        if comm.rank == step % comm.size:
            model(images).square().sum().backward()
        optimizer.step()
        plain.zero_grad()
        reference(images).square().sum().backward()
        plain.step()
    assert_same_parameters(model, reference, 1e-12)


def test_grad_scaler_sees_the_summed_gradient_and_an_overflow_on_one_rank(comm):
    model, reference = tiny_model(torch.float32), tiny_model(torch.float32)
    placement = Replicated(model.parameters(), comm)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=0.5, placement=placement)
    plain = LARS(parameter_groups(reference, 5e-3), lr=0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(5):
        images = torch.full((1, 3, 6, 6), 0.1 * step + 1.0)
        factor = 1e38 if step == 2 else 1.0
        mine = factor if comm.rank == comm.size - 1 else 1.0
        optimizer.zero_grad()
        scalers[0].scale(mine * model(images).square().mean() / comm.size).backward()
        scalers[0].step(optimizer)
        scalers[0].update()
        plain.zero_grad()
        scalers[1].scale(factor * reference(images).square().mean()).backward()
        scalers[1].step(plain)
        scalers[1].update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 512.0
    assert_same_parameters(model, reference, 1e-6)


def test_a_parameter_outside_the_placement_is_refused(comm):
    model = tiny_model(torch.float32)
    placement = Replicated(model[0].parameters(), comm)
    with pytest.raises(ValueError, match="not in its placement"):
        LARS(model.parameters(), placement=placement)


def test_a_frozen_parameter_stays(comm):
    model = tiny_model(torch.float32)
    placement = Replicated(model.parameters(), comm)
    optimizer = LARS(parameter_groups(model, 0.1), lr=29.0, placement=placement)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    model(torch.ones(1, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_dtype_that_cannot_be_summed_is_told_at_once(comm):
    with pytest.raises(TypeError, match="gradients: bfloat16 cannot be summed over ranks"):
        Replicated(tiny_model(torch.bfloat16).parameters(), comm)


def test_evaluation_counts_every_sample_once(comm):
    trainer = tiny_trainer(comm, torch.float64, 8)
    found = tiny_evaluator(trainer).evaluate(trainer.model)
    images, labels = trainer.feed.source.eval_batch(torch.arange(37).numpy())
    logits = trainer.model(images)
    assert found.num_samples == 37
    assert found.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found.means["top5"] == 1.0  # of five classes
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found.means["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_differing_tensor_is_named_with_its_ranks(comm):
    state = {"first": torch.ones(3), "weight": torch.ones(5), "last": torch.ones(2)}
    verify_agreement(state, comm)
    if comm.size == 1:
        return
    if comm.rank == comm.size - 1:
        state["weight"][4] += 2**-23
        state["last"] += 1
    with pytest.raises(ReplicasDifferError) as caught:
        verify_agreement(state, comm)
    assert f"weight differs from rank 0's on ranks [{comm.size - 1}]" in str(caught.value)
    assert "2 of 3" in str(caught.value)


def test_buffers_become_their_mean_over_the_ranks_that_saw_a_batch(comm):
    norm = torch.nn.BatchNorm1d(3)
    average_buffers(norm, comm)
    assert norm.running_mean.tolist() == [0.0] * 3  # nobody has seen a batch
    idle = comm.size - 1
    if comm.size == 1 or comm.rank < idle:
        norm.running_mean.fill_(float(comm.rank))
        norm.num_batches_tracked.fill_(5)
    average_buffers(norm, comm)
    assert norm.running_mean.tolist() == [max(0, comm.size - 2) / 2] * 3
    assert norm.num_batches_tracked.item() == (0 if comm.size > 1 and comm.rank == idle else 5)


def test_a_run_starts_from_rank_0s_weights(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16, seed=comm.rank)
    broadcast_and_verify(trainer.state.tensors(), comm)
    tiny_loop(trainer, folder).run()
    same = tiny_trainer(comm, torch.float32, 16, seed=0)
    tiny_loop(same, folder / "again").run()
    assert_same_parameters(trainer.model, same.model, 1e-12)


def test_restore_gives_all_ranks_rank_0s_checkpoint(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16)
    for step in range(3):
        trainer.train_step(trainer.feed.from_step(step))
    checkpointer = Checkpointer(folder, comm)
    trainer.state.restored(Progress(step=3))
    checkpointer.save(trainer.state)
    saved = {name: t.clone() for name, t in trainer.state.tensors().items()}

    other = tiny_trainer(comm, torch.float32, 16, seed=1 + comm.rank)
    checkpointer.restore(other.state)
    assert other.state.progress.step == 3
    restored = other.state.tensors()
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
    other.train_step(other.feed.from_step(3))
    trainer.train_step(trainer.feed.from_step(3))
    for a, b in zip(other.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
