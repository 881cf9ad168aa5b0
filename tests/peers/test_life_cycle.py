"""A placement's life: every natural mistake is right or a clear error, on all ranks alike."""

import pytest
import torch
from tiny import assert_same_parameters, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_lars import LAMB, LARS, Replicated, Sharded, parameter_groups

pytestmark = [
    pytest.mark.ranks(1, 2, 3),
    pytest.mark.parametrize("placed", [Replicated, Sharded]),
]


def made(comm, placed, seed=0):
    model = tiny_model(torch.float64, seed)
    placement = placed(model.parameters(), comm, bucket_bytes=500)
    return model, LARS(parameter_groups(model, 5e-3), lr=1.0, placement=placement)


def backward(comm, model, value=1.0):
    images = torch.full((1, 3, 6, 6), value, dtype=torch.float64)
    (model(images).square().sum() / comm.size).backward()


def after(steps):
    """One device's parameters after so many steps."""
    model = tiny_model(torch.float64)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=1.0)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3, 6, 6), 1.0 + step, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model


def assert_two_steps_are_right(comm, model, optimizer):
    for step in range(2):
        optimizer.zero_grad()
        backward(comm, model, 1.0 + step)
        optimizer.step()
    assert_same_parameters(model, after(2), 1e-12)


def test_a_forgotten_zero_grad(comm, placed):
    model, optimizer = made(comm, placed)
    optimizer.zero_grad()
    backward(comm, model)
    optimizer.step()
    if placed is Sharded:  # it forgets summed gradients by itself
        backward(comm, model, 2.0)
        optimizer.step()
        assert_same_parameters(model, after(2), 1e-12)
        return
    with pytest.raises(RuntimeError, match=r"backward\(\) before optimizer.zero_grad\(\)"):
        backward(comm, model, 2.0)
    assert_same_parameters(model, after(1), 1e-12)


def test_gradients_that_the_model_forgets(comm, placed):
    model, optimizer = made(comm, placed)
    for step in range(3):
        model.zero_grad()
        backward(comm, model, 1.0 + step)
        optimizer.step()
    assert_same_parameters(model, after(3), 1e-12)


def test_step_twice(comm, placed):
    model, optimizer = made(comm, placed)
    backward(comm, model)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\) without a backward pass since the last one"):
        optimizer.step()
    assert_same_parameters(model, after(1), 1e-12)
    optimizer.zero_grad()
    backward(comm, model, 2.0)
    optimizer.step()
    assert_same_parameters(model, after(2), 1e-12)


def test_two_optimizers_over_one_placement(comm, placed):
    model, optimizer = made(comm, placed)
    other = LARS(model.parameters(), lr=1.0, placement=optimizer.placement)
    backward(comm, model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="or by two optimizers over one placement"):
        other.step()


@pytest.mark.parametrize("new", ["another", "none"])
def test_a_gradient_that_is_replaced_after_backward(comm, placed, new):
    model, optimizer = made(comm, placed)
    backward(comm, model)
    param = model[0].weight
    param.grad = torch.ones_like(param) if new == "another" else None
    done = "replaced" if new == "another" else "set to None"
    with pytest.raises(RuntimeError, match=f"was {done} after backward had summed it"):
        optimizer.step()


def test_a_rank_without_samples_does_not_guess_the_order_of_two_placements(comm, placed):
    """Rank 0's one backward pass reduces both, in an order that the other ranks cannot know.

    One that takes part in no backward pass of any rank is no such case, nor is a single rank.
    """
    models, optimizers = zip(*(made(comm, placed) for _ in range(2)), strict=True)
    for _ in range(2):  # with samples on every rank it is right
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(comm, nn.Sequential(*models[1:], nn.Flatten(), nn.Identity()))
        backward(comm, models[0])
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    backward(comm, models[1])
    for optimizer in reversed(optimizers):
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    if comm.size == 1:
        optimizers[0].step()
        return
    with pytest.raises(RuntimeError, match="this rank had no backward pass in this step, and"):
        optimizers[0].step()
    del models, optimizers, optimizer
    model, optimizer = made(comm, placed)  # the dropped ones do not count
    optimizer.step()


def test_ranks_that_start_from_other_weights_take_rank_0s(comm, placed):
    model, optimizer = made(comm, placed, seed=comm.rank)
    assert_two_steps_are_right(comm, model, optimizer)


@pytest.mark.parametrize("how", ["strides", "order", "number", "dtype"])
def test_ranks_of_another_layout_are_named(comm, placed, how):
    model = tiny_model(torch.float32)
    params = list(model.parameters())
    if comm.rank == comm.size - 1:
        if how == "strides":
            params = list(model.to(memory_format=torch.channels_last).parameters())
        elif how == "order":
            params.reverse()
        elif how == "number":
            params.pop()
        else:
            params = list(model.double().parameters())
    if comm.size == 1:
        placed(params, comm)
        return
    with pytest.raises(ValueError, match=f"parameters of rank {comm.size - 1} are not rank 0's: "):
        placed(params, comm)


def test_an_exception_in_backward_leaves_nothing_behind(comm, placed):
    model, optimizer = made(comm, placed)
    handle = model[0].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(comm, model)
    handle.remove()
    assert_two_steps_are_right(comm, model, optimizer)


def test_a_model_that_moves_after_its_placement(comm, placed):
    model, optimizer = made(comm, placed)
    model.to(memory_format=torch.channels_last)
    backward(comm, model)
    with pytest.raises(RuntimeError, match="was moved or replaced after its placement was made"):
        optimizer.step()


def test_a_gradient_that_no_rank_holds_cannot_be_read(comm, placed):
    """Clipping and GradScaler are right under Replicated, and say what is wrong under Sharded."""
    model, optimizer = made(comm, placed)
    backward(comm, model)
    if placed is Sharded:
        with pytest.raises(RuntimeError, match="param.grad under Sharded: .* use Replicated"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match="param.grad under Sharded: .* use Replicated"):
            scaler.step(optimizer)
        optimizer.step()
        assert_same_parameters(model, after(1), 1e-12)
        return
    alone = tiny_model(torch.float64)
    alone(torch.ones(1, 3, 6, 6, dtype=torch.float64)).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), norm)
    LARS(parameter_groups(alone, 5e-3), lr=1.0).step()
    optimizer.step()
    assert_same_parameters(model, alone, 1e-12)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_forgotten_placement(comm, placed, kind):
    model = tiny_model(torch.float64)
    optimizer = kind(parameter_groups(model), lr=1.0)
    placement = placed(model.parameters(), comm)
    backward(comm, model)
    with pytest.raises(
        RuntimeError, match=rf"was not given: pass it as {kind.__name__}\(…, placement=placement"
    ):
        optimizer.step()
    assert placement.gradients.steps == 0


def test_two_placements(comm, placed):
    model, optimizer = made(comm, placed)
    with pytest.raises(ValueError, match="is in another placement already"):
        placed(list(model.parameters())[1:], comm)
    assert_two_steps_are_right(comm, model, optimizer)


def test_a_placement_that_was_dropped_makes_room_for_another(comm, placed):
    model, optimizer = made(comm, placed)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=1.0)
    optimizer.placement = placed(model.parameters(), comm, bucket_bytes=300)
    assert_two_steps_are_right(comm, model, optimizer)


def test_gradients_of_which_some_are_forgotten(comm, placed):
    """The others have the sums of the step before in them under Replicated."""
    model, optimizer = made(comm, placed)
    backward(comm, model)
    optimizer.step()
    model[-1].zero_grad()
    if placed is Sharded:
        backward(comm, model, 2.0)
        optimizer.step()
        assert_same_parameters(model, after(2), 1e-12)
        return
    with pytest.raises(RuntimeError, match=r"backward\(\) before optimizer.zero_grad\(\)"):
        backward(comm, model, 2.0)


def test_a_window_that_is_dropped_without_a_step(comm, placed):
    model, optimizer = made(comm, placed)
    backward(comm, model, 3.0)
    model.zero_grad()
    assert_two_steps_are_right(comm, model, optimizer)


def test_a_second_backward_outside_no_sync(comm, placed):
    model, _ = made(comm, placed)
    backward(comm, model)
    with pytest.raises(RuntimeError, match=r"wrap all but the last .* in .*no_sync\(\)"):
        backward(comm, model)


@pytest.mark.parametrize("split", [0, 2, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_reentrant_checkpoints_are_one_backward(comm, placed, split, nested):
    """Each runs a backward pass inside; its end is not the end of the gradients."""
    model, optimizer = made(comm, placed)
    head = model[split:]

    def run(images):
        return checkpoint(head, images, use_reentrant=True) if nested else head(images)

    for step in range(2):
        optimizer.zero_grad()
        images = torch.full((1, 3, 6, 6), 1.0 + step, dtype=torch.float64, requires_grad=True)
        found = checkpoint(run, model[:split](images), use_reentrant=True)
        (found.square().sum() / comm.size).backward()
        optimizer.step()
    assert_same_parameters(model, after(2), 1e-12)


def test_a_tensor_that_is_given_twice_is_one(comm, placed):
    model = tiny_model(torch.float64)
    placement = placed([*model.parameters(), *model.parameters()], comm, bucket_bytes=500)
    optimizer = LARS(parameter_groups(model, 5e-3), lr=1.0, placement=placement)
    assert_two_steps_are_right(comm, model, optimizer)
