"""LARS inside Horovod's own DistributedOptimizer."""

import pytest
import torch
from tiny import assert_same_parameters, tiny_model

from hvd_lars.optim import LARS, Replicated, Sharded, parameter_groups
from hvd_lars.optim.lamb import LAMB

pytestmark = pytest.mark.ranks(1, 2, 3, 4)


@pytest.mark.parametrize("adapt", ["weights", "layer", "all"])
def test_the_wrapped_optimizer_takes_the_same_steps(comm, adapt):
    if comm.backend != "horovod":
        return
    import horovod.torch as hvd

    options = {"lr": 3.0, "trust_coefficient": 0.02, "nesterov": True, "eps": 1e-5}
    model, reference = tiny_model(torch.float64), tiny_model(torch.float64)
    optimizer = hvd.DistributedOptimizer(
        LARS(parameter_groups(model, 5e-3, adapt=adapt), **options),
        named_parameters=model.named_parameters(),
        op=hvd.Average,
    )
    plain = LARS(parameter_groups(reference, 5e-3, adapt=adapt), **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.3) for o in (optimizer, plain)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, comm.size, 4, 3, 6, 6, generator=generator, dtype=torch.float64)
    for step in range(5):
        optimizer.zero_grad()
        model(images[step, comm.rank]).square().mean().backward()
        optimizer.step()
        plain.zero_grad()
        reference(images[step].flatten(0, 1)).square().mean().backward()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    assert type(optimizer).__name__ == "LARS"
    assert {g["eps"] for g in optimizer.param_groups} == {1e-5}
    assert_same_parameters(model, reference, 1e-12)


@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_horovods_optimizer_around_a_placement_is_named(comm, placed):
    if comm.backend != "horovod":
        return
    import horovod.torch as hvd

    model = tiny_model(torch.float64)
    placement = placed(model.parameters(), comm)
    # Nobody waits for its reductions: names of their own keep them from the next test's.
    named = [(f"{placed.__name__}.{name}", param) for name, param in model.named_parameters()]
    optimizer = hvd.DistributedOptimizer(
        LARS(parameter_groups(model), lr=1.0, placement=placement), named_parameters=named
    )
    # Whichever of the two hooks comes first may be the one that cannot go on.
    with pytest.raises(RuntimeError, match="hvd.DistributedOptimizer is around a LARS|Sharded"):
        model(torch.ones(1, 3, 6, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()


def test_adasum_with_shared_ratios_is_refused(comm):
    """It steps on one tensor at a time, so that no bias would find its weight's ratio."""
    if comm.backend != "horovod" or comm.controller == "Gloo" or comm.size not in (2, 4):
        return  # Horovod has Adasum for powers of two, over MPI
    import horovod.torch as hvd

    for adapt in ("weights", "layer"):
        model = tiny_model(torch.float32)
        optimizer = hvd.DistributedOptimizer(
            LARS(parameter_groups(model, adapt=adapt), lr=1.0),
            named_parameters=model.named_parameters(),
            op=hvd.Adasum,
        )
        if adapt == "weights":
            model(torch.ones(1, 3, 6, 6)).sum().backward()
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match="hvd.Adasum steps on one tensor at a time"):
            model(torch.ones(1, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("kind", [LARS, LAMB])
@pytest.mark.parametrize("wrapped", [False, True])
def test_horovods_way_to_broadcast_a_state_moves_no_weights(comm, wrapped, kind):
    """It takes a step with zero gradients on ranks that have no state."""
    if comm.backend != "horovod":
        return
    import horovod.torch as hvd

    model, untouched = tiny_model(torch.float64), tiny_model(torch.float64)
    optimizer = kind(parameter_groups(model, 5e-3), lr=3.0)
    if wrapped:
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    with pytest.raises(RuntimeError, match="load its state_dict\\(\\) on every rank"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_same_parameters(model, untouched, 1e-300)
