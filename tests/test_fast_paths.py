"""Precision, compression and the choice of kernel and placement."""

import weakref

import pytest
import torch
from tiny import assert_same_parameters, tiny_model, tiny_trainer

from hvd_lars.assemble import choices, placing
from hvd_lars.comm.compressed import CompressedReducer
from hvd_lars.config.file import load_config
from hvd_lars.config.schema import Comm
from hvd_lars.errors import UserError
from hvd_lars.optim import Replicated, Sharded
from hvd_lars.optim.kernels import agreed
from hvd_lars.optimizers import LarsSettings
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import verify_agreement

pytestmark = pytest.mark.ranks(2, 3)

CPU = torch.device("cpu")


def steps(trainer, count=8):
    for step in range(count):
        trainer.train_step(trainer.feed.from_step(step))
    return trainer


@pytest.mark.parametrize("placed", [Replicated, Sharded])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_float32_and_ranks_agree(comm, precision, placed):
    exact = steps(tiny_trainer(comm, torch.float32, 16), 4)
    trainer = steps(tiny_trainer(comm, torch.float32, 16, placed=placed, precision=precision), 4)
    verify_agreement(trainer.state.tensors(), comm)
    assert_same_parameters(trainer.model, exact.model, 0.02)
    for param in trainer.model.parameters():
        assert param.dtype == torch.float32
        assert not torch.equal(param, param.to(torch.bfloat16).float())


@pytest.mark.parametrize("placed", [Replicated, Sharded])
def test_a_loss_scale_that_overflows_is_halved_on_all_ranks_until_it_fits(comm, placed):
    trainer = tiny_trainer(comm, torch.float32, 16, placed=placed, precision="fp16")
    trainer.state.restored(Progress(loss_scale=2.0**26))
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train_step(trainer.feed.from_step(0))
    assert trainer.state.progress.skipped_steps == 1
    assert trainer.loss_scale.value == 2.0**25
    for param, held in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(param, held)
    for step in range(1, 20):
        trainer.train_step(trainer.feed.from_step(step % 8))
    assert 1 < trainer.state.progress.skipped_steps < 20
    assert trainer.loss_scale.value == 2.0 ** (26 - trainer.state.progress.skipped_steps)
    assert all(param.isfinite().all() for param in trainer.model.parameters())
    verify_agreement(trainer.state.tensors(), comm)


def test_channels_last_computes_the_same(comm):
    exact = steps(tiny_trainer(comm, torch.float64, 16))
    trainer = tiny_trainer(comm, torch.float64, 16, channels_last=True)
    assert_same_parameters(steps(trainer).model, exact.model, 1e-12)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
def test_compressed_sums_keep_eleven_bits_at_any_magnitude(comm, magnitude):
    if comm.backend == "mpi":
        return
    reducer = CompressedReducer(comm)
    for step in range(4):
        tensor = torch.linspace(-1, 1, 1000) * magnitude * (comm.rank + 1 + step)
        exact = torch.linspace(-1, 1, 1000, dtype=torch.float64) * magnitude
        exact *= sum(rank + 1 + step for rank in range(comm.size))
        reducer.start_all_reduce_sum(tensor, "bucket").wait()
        bound = 1e-7 if step == 0 else 2.0**-10  # the first sum is float32: nothing is known yet
        assert (tensor - exact).abs().max() <= bound * magnitude * (comm.size + step) * comm.size
        verify_agreement({"sum": tensor}, comm)


def test_a_compressed_sum_that_does_not_fit_is_taken_again_in_float32(comm):
    if comm.backend == "mpi":
        return
    reducer = CompressedReducer(comm)
    for magnitude in (1.0, 1e6, 1e-6, 0.0, 3.0):
        tensor = torch.full((10,), magnitude)
        reducer.start_all_reduce_sum(tensor, "bucket").wait()
        torch.testing.assert_close(
            tensor, torch.full((10,), magnitude * comm.size), rtol=1e-3, atol=0
        )
    counts = torch.ones(3, dtype=torch.int64)
    reducer.start_all_reduce_sum(counts, "counts").wait()
    assert counts.tolist() == [comm.size] * 3


def test_all_ranks_take_the_kernel_that_all_have(comm, monkeypatch):
    assert agreed.agree_on_kernel("auto", CPU, comm) == "native"
    assert agreed.agree_on_kernel("eager", CPU, comm) == "eager"
    lacking = comm.size - 1
    if comm.rank == lacking:
        monkeypatch.setattr(agreed, "why_not_native", lambda _: "it was not built")
    assert agreed.agree_on_kernel("auto", CPU, comm) == "fused"
    with pytest.raises(UserError, match=f"found native, which 1 of {comm.size} ranks cannot use"):
        agreed.agree_on_kernel("native", CPU, comm)
    with pytest.raises(UserError, match="kernel fused runs on CPU"):
        agreed.agree_on_kernel("fused", torch.device("cuda"), comm)


def test_what_is_left_to_measurement_is_settled_alike_on_all_ranks_and_told(comm, capsys):
    model = tiny_model(torch.float32)
    left = ["optimizer.placement=auto", "comm.bucket_mb=auto", "train.micro_batch=4"]
    left += ["data={name: synthetic, image_size: 6}"]
    config = choices.settle(load_config("digits", left), model, 5, comm, CPU)
    chosen = config.optimizer.kernel, config.optimizer.placement, config.comm.bucket_mb
    assert comm.broadcast_object(chosen) == chosen
    assert chosen[0] == "native"
    assert chosen[1] in (("replicated",) if comm.size == 1 else ("replicated", "sharded"))
    assert chosen[2] in choices._BUCKETS
    told = capsys.readouterr().out
    if comm.rank > 0:
        assert told == ""
        return
    assert f"comm.bucket_mb auto: {chosen[2]:g}; step time: 1 " in told
    if comm.size == 1:
        assert "optimizer.placement auto: replicated, as there is one rank" in told
    else:
        assert f"optimizer.placement auto: {chosen[1]}; step time: replicated " in told
    # The model itself takes no step and gets no hooks.
    assert all(param.grad is None and not param._backward_hooks for param in model.parameters())
    torch.testing.assert_close(tiny_model(torch.float32).state_dict(), model.state_dict())


def test_a_trial_leaves_nothing_on_the_device(comm):
    config = load_config("digits", ["train.micro_batch=4", "data={name: synthetic, image_size: 6}"])
    trial, alive = choices._Trial(tiny_model(torch.float32), 5, config, comm, CPU), []

    def seconds(model, *rest):
        alive.extend(map(weakref.ref, model.parameters()))
        return take(model, *rest)

    take, trial._seconds = trial._seconds, seconds
    trial.milliseconds()
    assert alive
    assert all(reference() is None for reference in alive)


def test_compression_is_refused_where_it_cannot_be(comm):
    model, fp16 = tiny_model(torch.float32), Comm(compression="fp16")
    with pytest.raises(UserError, match="comm.compression: found fp16; must be none with"):
        placing.place(model, comm, LarsSettings(placement="sharded"), fp16)
    if comm.backend == "mpi":
        with pytest.raises(UserError, match="fp16 needs comm.backend horovod"):
            placing.place(model, comm, LarsSettings(), fp16)
