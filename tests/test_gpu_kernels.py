"""What the GPU's kernels have of their own; their steps are in test_lars.py and test_kernels.py."""

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from hvd_lars import LARS
from hvd_lars.optim.device_step import DeviceStep
from hvd_lars.optim.kernels import choose_kernel, gpu
from hvd_lars.optim.layers import layers_of

COMPILE = """
import json
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hvd_lars.optim.kernels import triton_kernels as kernels

TYPES = dict.fromkeys(["chunks", "layers"], "*i64") | {"arrived": "*i32"}
TYPES |= dict.fromkeys(["groups", "ratios", "factor", "partials", "sums", "constants"], "*fp64")
TYPES |= {"sources": "i32"}

def assembly(kernel, generation, checked=False, **constants):
    names = kernel.arg_names
    TYPES["alive"] = "*i1" if checked else "*fp64"
    source = ASTSource(
        fn=kernel,
        signature={name: TYPES.get(name, "constexpr") for name in names},
        constexprs={
            (names.index(name),): value
            for name, value in (constants | SIZES).items()
        },
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if TYPES.get(name, "").startswith("*")
        },
    )
    found = triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm
    assert found["cubin"]
    return found["ptx"]

KINDS = [(False, False, True), (True, True, True), (True, False, False)]
SIZES = dict(CHUNK=kernels.CHUNK, FOLD=kernels.FOLD)
counts = []
for generation in (80, 90):
    for aligned in (False, True):
        sums = assembly(
            kernels.sums_kernel, generation, DTYPE=tl.float32, WIDE=tl.float32, ALIGNED=aligned
        )
        counts.append([aligned, sums.count("ld.global.v4"), 0])
        for half, nesterov, checked in KINDS:
            update = assembly(
                kernels.update_kernel,
                generation,
                checked=checked,
                WEIGHT=tl.float32,
                GRADIENT=tl.bfloat16 if half else tl.float32,
                HAS_BUFFER=True,
                HAS_COPY=half,
                NESTEROV=nesterov,
                HAS_RATIOS=nesterov,
                IS_SCALED=checked,
                ALIGNED=aligned,
            )
            counts.append([aligned, update.count("ld.global.v4"), update.count("st.global.v4")])
print(json.dumps(counts))
"""


def test_the_kernels_compile_for_gpus_and_load_16_bytes_at_once_where_they_may():
    """Triton's compiler needs no GPU; without the interpreter's variable it is the real one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for aligned, loads, stores in json.loads(done.stdout):
        assert (loads > 0) == aligned
        assert stores == 0 or aligned


def with_the_gpus_kernel(take_kernel, lr, sizes):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in sizes]
    optimizer = LARS(params, lr=lr, weight_decay=1e-3, kernel=take_kernel("gpu"))
    for _ in range(4):
        for param in params:
            param.grad = torch.cos(param.detach() * 3)
        optimizer.step()
    return optimizer, torch.cat([param.detach() for param in params])


@pytest.mark.parametrize("sizes", [(64, 8), (64, 8, 5), (9000, 16384)])
def test_a_rate_on_the_device_and_any_alignment_take_the_same_steps(take_kernel, sizes):
    _, wanted = with_the_gpus_kernel(lambda _: "eager", 2.0, sizes)
    _, found = with_the_gpus_kernel(take_kernel, torch.tensor(2.0), sizes)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_rate_on_the_device_can_be_changed_there(take_kernel):
    ends = []
    for rate in (torch.tensor(2.0), 2.0):
        optimizer, before = with_the_gpus_kernel(take_kernel, rate, (300,))
        if isinstance(rate, torch.Tensor):
            rate.fill_(0.5)
        else:
            optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        ends.append(optimizer.param_groups[0]["params"][0].detach())
        assert not torch.equal(ends[-1], before)
    assert torch.equal(*ends)


def test_a_steps_sums_stay_where_a_captured_step_reads_them(take_kernel):
    optimizer, _ = with_the_gpus_kernel(take_kernel, 2.0, (64, 8))
    [layers] = layers_of(optimizer.param_groups, placed=False, all_norms=False)
    device, memory = DeviceStep(layers), []
    for _ in range(2):
        device.begin(optimizer.state, None, same_states=True)
        norms = device.norms(device.sums_of_squares(None, 1.0), 1.0)
        with torch.no_grad():
            device.update(norms, 1.0, None)
        device.end()
        memory.append(device.weight_sums.data_ptr())
    assert memory[0] == memory[1]
    weights = optimizer.param_groups[0]["params"]
    wanted = torch.stack([w.detach().double().square().sum() for w in weights])
    torch.testing.assert_close(device.weight_sums, wanted, rtol=1e-6, atol=0)


def test_a_gpu_that_cannot_run_them_or_gets_them_wrong_takes_plain_torch(monkeypatch, take_kernel):
    take_kernel("gpu")
    cpu = torch.device("cpu")
    gpu.try_on.cache_clear()
    choose_kernel.cache_clear()
    try:
        assert gpu.try_on(cpu) == ""
        assert choose_kernel("auto", "cuda").name == "eager"  # there is no GPU
        with pytest.raises(ValueError, match="kernel native: Triton does not run here: "):
            choose_kernel("native", "cuda")
        gpu.try_on.cache_clear()
        monkeypatch.setattr(gpu.GpuKernel, "sums_of_squares", lambda *_: torch.zeros(3))
        assert gpu.try_on(cpu) == "Triton's results differ from torch's here"
    finally:
        gpu.try_on.cache_clear()
        choose_kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", ["no", "number", "tensor"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_on_a_gpu_also_in_a_cuda_graph(dtype, nesterov, scaled):
    torch.manual_seed(0)
    start = [torch.randn(n, dtype=dtype) for n in (70_000, 4096, 5, 64)]
    options = {"weight_decay": 1e-3, "trust_coefficient": 0.02, "nesterov": nesterov}
    ends = []
    for device, kernel in (("cpu", "eager"), ("cuda", "native")):
        params = [nn.Parameter(tensor.to(device, copy=True)) for tensor in start]
        for param in params:
            param.grad = torch.zeros_like(param)
        rate = torch.tensor(2.0, device=device)
        optimizer = LARS(params, lr=rate, kernel=kernel, **options)
        whole = torch.full((), 4.0, dtype=torch.float64, device=device)
        scale = {"no": None, "number": 4.0, "tensor": whole}[scaled]
        replay = take = partial(optimizer.step, loss_scale=scale)
        for step in range(8):
            for param in params:
                param.grad.copy_(torch.cos(param.detach() * 3 + step))
                if scale is not None:
                    param.grad.mul_(math.nan if step == 6 else 4.0)  # the step of NaN is skipped
            rate.fill_(2.0 - 0.1 * step)
            if device == "cuda" and step == 3:
                graph = torch.cuda.CUDAGraph()
                held = [param.detach().clone() for param in params]
                with torch.cuda.graph(graph):
                    take()
                assert all(torch.equal(a, b) for a, b in zip(held, params, strict=True))
                replay = graph.replay
            replay()
        ends.append(torch.cat([param.detach().cpu().float() for param in params]))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(*ends, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
    ],
)
def test_blocks_of_several_kinds_take_the_steps_of_plain_torch(take_kernel, dtypes):
    """The tables hold indices 1 and factors 1.0, which are one key to a dictionary."""
    ends = []
    for name in ("eager", "gpu"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(40).to(dtype)) for dtype in dtypes]
        optimizer = LARS(params, lr=2.0, weight_decay=1e-3, kernel=take_kernel(name))
        for _ in range(4):
            for param in params:
                param.grad = torch.cos(param.detach() * 3)
            optimizer.step(loss_scale=1.0)
        ends.append(torch.cat([param.detach().double() for param in params]))
    torch.testing.assert_close(*ends, rtol=1e-2 if torch.bfloat16 in dtypes else 1e-5, atol=1e-6)


def test_the_tables_keep_no_memory_of_an_edited_or_dropped_optimizer(take_kernel):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(100)) for _ in range(3)]
    optimizer = LARS(params, lr=2.0, kernel=take_kernel("gpu"))
    gradients = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            optimizer.zero_grad()
            for param in params:
                param.grad = torch.cos(param.detach() * 3)
                gradients.add(param.grad)
            optimizer.step()
            with torch.no_grad():
                params[0].clamp_(-1.0, 1.0)  # the blocks are made again
        del param
        assert len(gradients) <= 2 * len(params)
        momentum = [weakref.ref(optimizer.state[param]["momentum_buffer"]) for param in params]
        del optimizer
        assert [reference() for reference in momentum] == [None] * 3
    finally:
        gc.enable()


def test_tables_are_made_again_only_for_what_moved(take_kernel, monkeypatch):
    made, renewed = [], []
    make, renew = gpu._Plan.__init__, gpu._Launch.renew
    monkeypatch.setattr(gpu._Plan, "__init__", lambda *a: made.append(1) or make(*a))
    monkeypatch.setattr(gpu._Launch, "renew", lambda *a: renewed.append(1) or renew(*a))
    optimizer, _ = with_the_gpus_kernel(take_kernel, 2.0, (64, 8))
    assert len(made) <= 2  # the first step creates the momentum
    count = len(renewed)
    params = optimizer.param_groups[0]["params"]
    kept = [torch.ones_like(param) for param in params]
    for _ in range(3):
        for param, gradient in zip(params, kept, strict=True):
            param.grad = gradient
        optimizer.step()
    assert len(made) <= 2
    assert len(renewed) == count + 1


def test_tables_live_as_long_as_the_gradients_that_a_captured_step_reads(take_kernel):
    """A replay refers to nothing; without a placement no one else keeps the tables."""
    param = nn.Parameter(torch.ones(5))
    optimizer = LARS([param], lr=1.0, kernel=take_kernel("gpu"))
    param.grad = torch.ones(5)
    for _ in range(2):
        optimizer.step()
    [device] = optimizer._last.devices
    alive = weakref.ref(device._gradients.tables)
    gpu._sums_tables.cache_clear()  # as 256 other lists of tensors would
    optimizer.step()
    assert alive() is not None
    param.grad.data = torch.ones(5)  # elsewhere: other tables
    optimizer.step()
    gpu._sums_tables.cache_clear()
    assert alive() is None
