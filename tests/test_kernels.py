"""The ways to compute a step: layouts, dtypes, and what each has of its own."""

import copy
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import lars_oracle
from torch import nn

from hvd_lars import LARS
from hvd_lars.optim import device_step
from hvd_lars.optim.kernels import Block, KnownRatios, choose_kernel
from hvd_lars.optim.norms import sums_of_squares

PACKAGE = Path(__file__).parents[1] / "hvd_lars"
KERNELS = ["native", "fused", "eager", "gpu"]
OPTIONS = {"lr": 3.0, "weight_decay": 5e-4, "trust_coefficient": 0.02}


def rounded(array, dtype):
    return torch.from_numpy(array).to(dtype)


HALF = list(itertools.product([*KERNELS, "elsewhere"], [torch.bfloat16, torch.float16]))
HALF.remove(("gpu", torch.bfloat16))  # Triton's interpreter truncates where a GPU rounds


@pytest.mark.parametrize(("kernel", "dtype"), HALF)
@pytest.mark.parametrize("nesterov", [False, True])
def test_half_parameters_follow_float32_masters(kernel, dtype, nesterov, take_kernel):
    kernel = take_kernel(kernel)
    generator = np.random.default_rng(0)
    shapes = [(67, 33), (5,)]
    params = [nn.Parameter(rounded(generator.normal(size=s), dtype)) for s in shapes]
    gradients = [
        [rounded(generator.normal(size=s) / 100, dtype) for s in shapes] for _ in range(30)
    ]
    options = OPTIONS | {"nesterov": nesterov}
    wanted, buffers = lars_oracle.run(
        [p.detach().double().numpy() for p in params],
        [[g.double().numpy() for g in step] for step in gradients],
        [3.0] * 30,
        lars_oracle.Options(**{k: v for k, v in options.items() if k != "lr"}),
    )
    optimizer = LARS(params, kernel=kernel, **options)
    for i, step in enumerate(gradients):
        if i == 15:  # through a file in the middle
            params = [nn.Parameter(p.detach().clone()) for p in params]
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = LARS(params, kernel=kernel, **options)
            optimizer.load_state_dict(state)
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    for param, w, v in zip(params, wanted, buffers, strict=True):
        state = optimizer.state[param]
        master, buffer = state["master_weight"], state["momentum_buffer"]
        assert master.dtype == buffer.dtype == torch.float32
        assert torch.equal(param.detach().flatten(), master.to(dtype).flatten())
        for found, exact in ((master, w), (buffer, v)):
            error = np.linalg.norm(found.double().numpy().ravel() - exact.ravel())
            assert error / np.linalg.norm(exact) < 2e-5


def test_an_edited_half_parameter_takes_its_master_along():
    param = nn.Parameter(torch.ones(64, 3).bfloat16())
    optimizer = LARS([param], **OPTIONS)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(7.0)
    param.grad.zero_()
    optimizer.step()
    assert optimizer.state[param]["master_weight"].mean() > 6.9


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_formats_pair_up_the_same_elements(kernel, take_kernel):
    """Weights channels_last, gradients and loaded momentum contiguous; and one with gaps."""
    kernel = take_kernel(kernel)
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(8, 6, 3, 3))
    last = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    gapped = nn.Parameter(torch.empty(8, 6, 3, 8)[..., :3].copy_(plain.detach()))
    assert last.stride() != plain.stride() != gapped.stride()
    optimizers = [LARS([param], kernel=kernel, **OPTIONS) for param in (plain, last, gapped)]
    for step in range(6):
        gradient = torch.randn(8, 6, 3, 3)
        for param in (plain, last, gapped):
            param.grad = gradient.clone()
        if step == 3:
            state = copy.deepcopy(optimizers[0].state_dict())
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(state))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(last, plain, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(gapped, plain, rtol=3e-6, atol=1e-7)


def run(kernel, edit=lambda step, param: None, layers=3):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(70, 11 + i)) for i in range(layers)]
    optimizer = LARS(params, kernel=kernel, **OPTIONS)
    for step in range(6):
        for param in params:
            param.grad = torch.randn_like(param)
        edit(step, params[1])
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


@pytest.mark.parametrize("kernel", ["native", "fused", "gpu"])
def test_weights_that_somebody_edits_are_read_again(kernel, take_kernel):
    def halve(step, param):
        if step == 3:
            with torch.no_grad():
                param.mul_(0.5)

    eager, halved = run("eager"), run("eager", halve)
    kernel = take_kernel(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(kernel), eager, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(run(kernel, halve), halved, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(halved, eager, rtol=1e-3)


def test_an_edit_behind_torchs_back_is_told():
    def halve(step, param):
        if step == 3:
            param.data.mul_(0.5)

    with pytest.warns(RuntimeWarning, match="edited through .data between two steps") as told:
        run("native", halve)
    assert len(told) == 1


def test_native_steps_are_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    sizes = [300_001, 70_000, 5, 1]
    start = [torch.randn(n) for n in sizes]
    gradients = [torch.randn(n) for n in sizes]
    before, ends = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [nn.Parameter(w.clone()) for w in start]
        optimizer = LARS(params, kernel="native", **OPTIONS)
        for _ in range(3):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            optimizer.step()
        ends.append(torch.cat([param.detach() for param in params]))
    torch.set_num_threads(before)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_of_squares(kernel, dtype, take_kernel):
    torch.manual_seed(0)
    kernel = take_kernel(kernel)
    tensors = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (0, 1, 37, 4096, 1_000_003)]
    found = device_step.choose_kernel(kernel, "cpu").sums_of_squares(tensors)
    wanted = torch.stack([t.double().square().sum() for t in tensors])
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, wanted, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0
    )


@pytest.mark.parametrize("part", [(0, 200_003), (70_001, 199_998), (5, 5), (0, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["native", "gpu"])
def test_the_updates_sums_have_the_bits_of_sums_of_squares(name, dtype, part, take_kernel):
    torch.manual_seed(0)
    name = take_kernel(name)
    kernel = device_step.choose_kernel(name, "cpu")
    weight, gradient, buffer = torch.randn(3, 200_003, dtype=dtype).unbind()
    group = {"momentum": 0.9, "weight_decay": 1e-3, "lr": 1.0, "nesterov": False}
    group |= {"lr_position": "momentum", "zero_norm": "unit"}
    begin, end = part
    block = Block(weight, gradient, buffer, None, group, {}, part)
    wanted = kernel.sums_of_squares([weight[begin:end]])
    before, after = kernel.update([block], KnownRatios(torch.full((1,), 0.3).double()), 1.0)
    assert before is None or torch.equal(before, wanted)
    assert torch.equal(after, kernel.sums_of_squares([weight[begin:end]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_reads_every_half_number_and_rounds_as_torch_does(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    kernel = choose_kernel("native", "cpu")
    found = kernel.sums_of_squares(list(every.split(1)))
    wanted = every.float().square().double()  # the native kernel squares in float32 as well
    assert torch.equal(found.nan_to_num(-1.0), wanted.nan_to_num(-1.0))

    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    masters = torch.cat([bits.view(torch.float32), every.float(), torch.randn(1000) * 1e-5])
    masters = torch.cat([masters, (every.float() * (1 + 2**-11)), (every.float() * (1 + 2**-9))])
    masters = masters[~masters.isinf()]
    copied = torch.zeros(len(masters), dtype=dtype)
    group = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.0, "nesterov": False}
    group |= {"lr_position": "momentum", "zero_norm": "unit"}
    part = (0, len(masters))
    block = Block(masters.clone(), torch.zeros_like(copied), None, copied, group, {}, part)
    kernel.update([block], KnownRatios(torch.ones(1).double()), 1.0)
    assert torch.equal(copied.nan_to_num(3.0), masters.to(dtype).nan_to_num(3.0))


def test_plain_sums_take_tensors_of_any_layout():
    matrix = torch.arange(12.0).reshape(3, 4)
    found = sums_of_squares([matrix.t(), matrix[:, 1:3], matrix[:0]])
    assert found.tolist() == pytest.approx([506.0, (matrix[:, 1:3] ** 2).sum().item(), 0.0])


WITHOUT_LIBRARY = """
import pathlib
from hvd_lars.optim.kernels import choose_kernel, native
assert choose_kernel("auto", "cpu").name == "fused"
try:
    choose_kernel("native", "cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "its library was not built"), ("not a library", "_native.so cannot be loaded")],
)
def test_without_its_library_auto_takes_another_and_native_says_why(tmp_path, library, reason):
    package = tmp_path / "hvd_lars"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_native*.so", "__pycache__"))
    if library is not None:
        (package / "optim/kernels/_native.so").write_text(library)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    assert done.stdout.startswith("kernel native: ")


def test_the_fused_kernel_is_refused_off_the_cpu_and_native_where_it_knows_no_device():
    allowed = "cuda allowed: auto, native, eager"
    with pytest.raises(ValueError, match=f"kernel fused runs on CPU; .* {allowed}"):
        choose_kernel("fused", "cuda")
    with pytest.raises(ValueError, match="native: it does not know xpu; allowed here: auto, eager"):
        choose_kernel("native", "xpu")
    assert choose_kernel("auto", "xpu").name == choose_kernel("eager", "cuda").name == "eager"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("denominator", ["separate", "combined"])
def test_a_scaled_loss_takes_the_same_steps_and_an_overflow_none(kernel, denominator, take_kernel):
    torch.manual_seed(0)
    kernel = take_kernel(kernel)
    start = [torch.randn(40, 30, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    options = OPTIONS | {"kernel": kernel, "denominator": denominator}
    ends = []
    for scale in (None, 1024.0):
        params = [nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": params[:1]}, {"params": params[1:], "adapt": "none"}]
        optimizer = LARS(groups, **options)
        for step in range(5):
            for param in params:
                param.grad = torch.sin(param.detach() + step) * (scale or 1.0)
            if step == 3 and scale is not None:
                held, good = params[1].detach().clone(), params[1].grad.clone()
                for bad in (torch.inf, torch.nan):
                    params[1].grad[2] = bad
                    optimizer.step(loss_scale=scale)
                    assert optimizer.report.skipped
                    assert torch.equal(params[1].detach(), held)
                params[1].grad = good
            optimizer.step(loss_scale=scale)
            assert not optimizer.report.skipped
        ends.append(torch.cat([param.detach().flatten() for param in params]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-13, atol=1e-15)
