"""Several ranks compute what one device computes; run under launchers by test_rank_suites."""

import pytest
import torch
from tiny import GLOBAL_BATCH, RATES, assert_same_parameters, one_device, tiny_model, tiny_trainer

from hvd_lars.checkpoint import Checkpointer
from hvd_lars.data.sampler import accumulation
from hvd_lars.evaluation import evaluate
from hvd_lars.optim import LARS, Replicated, parameter_groups
from hvd_lars.replicas import ReplicasDifferError, average_buffers, named_state, verify_agreement

pytestmark = pytest.mark.ranks(1, 2, 3, 4)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def micro_batch_for(comm, pieces):
    """The micro-batch size that cuts a step into ``pieces``."""
    fullest = -(-GLOBAL_BATCH // comm.size)
    micro_batch = -(-fullest // pieces)
    assert accumulation(GLOBAL_BATCH, comm.size, micro_batch) == pieces
    return micro_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [1, 2, 5])
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
        trainer.train_step(step)
        verify_agreement(named_state(trainer.model, trainer.optimizer), comm)
    reference, reference_optimizer = one_device(dtype, **options)
    assert_same_parameters(trainer.model, reference, TOLERANCE[dtype])
    wanted = named_state(reference, reference_optimizer)
    found = named_state(trainer.model, trainer.optimizer)
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].norm() + 1e-30
        assert (found[name] - wanted[name]).norm() / scale < 30 * TOLERANCE[dtype], name


def test_the_same_ranks_end_with_the_same_bits_every_time(comm):
    ends = []
    for _ in range(3):
        trainer = tiny_trainer(comm, torch.float32, 7)
        for step in range(len(RATES)):
            trainer.train_step(step)
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
    placement.reduce_gradients()

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
    placement.reduce_gradients()
    once = [p.grad.clone() for p in model.parameters()]
    placement.reduce_gradients()
    for param, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(param.grad, gradient)


def test_a_second_backward_outside_no_sync_is_refused(comm):
    model = tiny_model(torch.float32)
    placement = Replicated(model.parameters(), comm)
    images = torch.ones(1, 3, 6, 6)
    model(images).sum().backward()
    with pytest.raises(RuntimeError, match="no_sync"):
        model(images).sum().backward()
    placement.reduce_gradients()


def test_grad_scaler_steps_after_the_reduction(comm):
    model = tiny_model(torch.float32)
    placement = Replicated(model.parameters(), comm)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=0.5, placement=placement)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference = tiny_model(torch.float32)
    plain = LARS(parameter_groups(reference, 5e-3), lr=0.5)
    for step in range(4):
        images = torch.full((1, 3, 6, 6), 0.1 * step + 1.0)
        optimizer.zero_grad()
        scaler.scale(model(images).square().mean() / comm.size).backward()
        placement.reduce_gradients()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        reference(images).square().mean().backward()
        plain.step()
    assert_same_parameters(model, reference, 1e-6)


def test_evaluation_counts_every_sample_once(comm):
    trainer = tiny_trainer(comm, torch.float64, 8)
    found = evaluate(trainer.model, trainer.source, comm, 8, trainer.device)
    images, labels = trainer.source.eval_batch(torch.arange(37).numpy())
    logits = trainer.model(images)
    assert found.num_samples == 37
    assert found.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found.top5 == 1.0  # of five classes
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found.loss == pytest.approx(loss, rel=1e-6)


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


def test_buffers_become_their_mean_over_ranks(comm):
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(comm.rank))
    average_buffers(norm, comm)
    assert norm.running_mean.tolist() == [(comm.size - 1) / 2] * 3
    assert norm.num_batches_tracked.item() == 0


def test_a_run_starts_from_rank_0s_weights(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16, folder, seed=comm.rank)
    trainer.run()
    same = tiny_trainer(comm, torch.float32, 16, folder / "again", seed=0)
    same.run()
    assert_same_parameters(trainer.model, same.model, 1e-12)


def test_restore_gives_all_ranks_rank_0s_checkpoint(comm, tmp_path):
    folder = comm.broadcast_object(tmp_path)
    trainer = tiny_trainer(comm, torch.float32, 16, folder)
    for step in range(3):
        trainer.train_step(step)
    checkpointer = Checkpointer(folder, comm)
    checkpointer.save(trainer.model, trainer.optimizer, {"step": 3})
    saved = {name: t.clone() for name, t in named_state(trainer.model, trainer.optimizer).items()}

    other = tiny_trainer(comm, torch.float32, 16, seed=1 + comm.rank)
    assert checkpointer.restore(other.model, other.optimizer)["step"] == 3
    restored = named_state(other.model, other.optimizer)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
    other.train_step(3)
    trainer.train_step(3)
    for a, b in zip(other.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
