"""LARS inside Horovod's own DistributedOptimizer; run under launchers by test_rank_suites."""

import pytest
import torch
from tiny import assert_same_parameters, tiny_model

from hvd_lars.optim import LARS, parameter_groups

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
