"""No step reads or writes memory that is not its own, or takes a tensor for what it was.

Each case runs in a process of its own: what it guards against is a crash.
"""

import json
import subprocess
import sys

import pytest

KERNELS = ("native", "fused", "eager")

PROGRAM = """
import json, sys, warnings
import torch
from hvd_lars import LARS, Replicated, Sharded
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.optim.kernels import why_not_native
kernel = sys.argv[1]
if kernel == "native" and why_not_native("cpu"):
    kernel = "fused"

def made(shape=(64, 33), dtype=torch.float32, **options):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(*shape).to(dtype))
    return param, LARS([param], lr=0.1, weight_decay=5e-4, kernel=kernel, **options)

def stepped(shape=(64, 33), dtype=torch.float32, **options):
    param, optimizer = made(shape, dtype, **options)
    param.grad = torch.randn(param.shape).to(dtype)
    optimizer.step()
    return param, optimizer

def said(action):
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""
"""

REFUSED = {
    # state that is loaded or set for another tensor
    "loaded": (
        "param, optimizer = made(); _, other = stepped((4, 3))\n"
        "optimizer.load_state_dict(other.state_dict()); param.grad = torch.ones(64, 33)\n"
        "result = said(optimizer.step)",
        "momentum_buffer has shape (4, 3), but its weight has (64, 33)",
    ),
    "loaded, as many elements": (
        "param, optimizer = made(); _, other = stepped((33, 64))\n"
        "optimizer.load_state_dict(other.state_dict()); param.grad = torch.ones(64, 33)\n"
        "result = said(optimizer.step)",
        "momentum_buffer has shape (33, 64), but its weight has (64, 33)",
    ),
    "set": (
        "param, optimizer = stepped()\n"
        "optimizer.state[param]['momentum_buffer'] = torch.zeros(7)\n"
        "result = said(optimizer.step)",
        "momentum_buffer has shape (7,), but its weight has (64, 33)",
    ),
    "resized": (
        "param, optimizer = stepped()\n"
        "optimizer.state[param]['momentum_buffer'].resize_(90000)\n"
        "result = said(optimizer.step)",
        "momentum_buffer has shape (90000,), but its weight",
    ),
    "set_momentum": (
        "param, optimizer = stepped()\n"
        "result = said(lambda: optimizer.set_momentum(param, torch.zeros(3)))",
        "momentum of shape (3,) for a parameter of (64, 33)",
    ),
    "master weight": (
        "param, optimizer = stepped(dtype=torch.bfloat16)\n"
        "optimizer.state[param]['master_weight'] = torch.zeros(5)\n"
        "result = said(optimizer.step)",
        "master_weight has shape (5,), but its weight",
    ),
    # a parameter that became another
    "larger parameter": (
        "param, optimizer = stepped(); param.data = torch.randn(640, 33)\n"
        "param.grad = torch.randn(640, 33); result = said(optimizer.step)",
        "momentum_buffer has shape (64, 33), but its weight has (640, 33)",
    ),
    "larger at the same address": (
        "base = torch.randn(100); param = torch.nn.Parameter(base[:50])\n"
        "optimizer = LARS([param], lr=0.1, kernel=kernel); param.grad = torch.ones(50)\n"
        "optimizer.step(); param.data = base; param.grad = torch.ones(100)\n"
        "result = said(optimizer.step)",
        "momentum_buffer has shape (50,), but its weight has (100,)",
    ),
    "larger gradient": (
        "param, optimizer = stepped(); param.grad.data = torch.randn(640, 33)\n"
        "result = said(optimizer.step)",
        "a gradient of (640, 33) for a parameter of (64, 33)",
    ),
    "smaller gradient at the same address": (
        "param, optimizer = stepped(); param.grad.data = param.grad.data[:3]\n"
        "result = said(optimizer.step)",
        "a gradient of (3, 33) for a parameter of (64, 33)",
    ),
    # placements
    "sharded, moved": (
        "param = torch.nn.Parameter(torch.randn(8, 4)); comm = LocalCommunicator()\n"
        "optimizer = LARS([param], lr=0.1, kernel=kernel, placement=Sharded([param], comm))\n"
        "(param ** 2).sum().backward(); optimizer.step()\n"
        "param.data = param.data.clone(); optimizer.zero_grad(); (param ** 2).sum().backward()\n"
        "result = said(optimizer.step)",
        "a parameter of shape (8, 4) was moved or replaced after its placement was made",
    ),
    "replicated, another layout": (
        "param = torch.nn.Parameter(torch.randn(4, 3, 2, 2)); comm = LocalCommunicator()\n"
        "optimizer = LARS([param], lr=0.1, kernel=kernel, placement=Replicated([param], comm))\n"
        "param.data = param.data.to(memory_format=torch.channels_last)\n"
        "(param ** 2).sum().backward(); result = said(optimizer.step)",
        "a parameter of shape (4, 3, 2, 2) was moved or replaced after its placement was made",
    ),
}

EQUAL = {
    # the first tensor is what was found, the second what is right
    "a column of a matrix moves alone": """
base = torch.randn(40, 3); before = base.clone()
param = torch.nn.Parameter(base[:, 1]); grad = torch.randn(40)
twin = torch.nn.Parameter(before[:, 1].clone())
for p in (param, twin):
    optimizer = LARS([p], lr=0.5, kernel=kernel)
    for _ in range(3):
        p.grad = grad.clone()
        optimizer.step()
wanted = before.clone(); wanted[:, 1] = twin.detach()
result = (base, wanted)
""",
    "a gradient of other strides that is kept": """
torch.manual_seed(0)
param = torch.nn.Parameter(torch.randn(6, 5, 1, 1).to(memory_format=torch.channels_last))
twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
both = [LARS([p], lr=0.5, kernel=kernel) for p in (param, twin)]
param.grad = torch.zeros(6, 5, 1, 1).as_strided((6, 5, 1, 1), (1, 6, 1, 1))
for i in range(4):
    new = torch.randn(6, 5, 1, 1)
    param.grad.copy_(new)  # as zero_grad(set_to_none=False) and backward do
    twin.grad = new
    for optimizer in both: optimizer.step()
result = (param.detach().contiguous(), twin.detach())
""",
    "a gradient whose data is replaced": """
param, optimizer = stepped(); twin, other = stepped()
for i in range(3):
    new = torch.randn(64, 33)
    if i == 1: param.grad.set_(new.clone())
    else: param.grad.data = new.clone()
    twin.grad = new
    optimizer.step(); other.step()
result = (param.detach(), twin.detach())
""",
    "a buffer whose data is replaced": """
param, optimizer = stepped(); twin, other = stepped()
optimizer.unfold_momentum(); other.unfold_momentum()
optimizer.state[param]["momentum_buffer"].data = torch.ones(64, 33)
other.state[twin]["momentum_buffer"] = torch.ones(64, 33)
for i in range(2): optimizer.step(); other.step()
result = (param.detach(), twin.detach())
""",
    "momentum that is set, and state that is replaced": """
param, optimizer = stepped(); twin, other = stepped()
optimizer.set_momentum(param, torch.ones(64, 33))
other.state[twin] = {"momentum_buffer": torch.ones(64, 33)}
wanted = param.detach().clone()
for o in (optimizer, other): o.param_groups[0]["lr"] = 0.0; o.step()
result = (torch.cat([param.detach(), twin.detach()]), torch.cat([wanted - 0.9, wanted - 0.9]))
""",
    "another kernel from here on": """
param, optimizer = stepped(); twin, other = stepped()
optimizer.param_groups[0]["kernel"] = "eager" if kernel != "eager" else "fused"
for i in range(3): optimizer.step(); other.step()
optimizer.unfold_momentum(); other.unfold_momentum()
found = torch.cat([param.detach(), optimizer.momentum(param)])
result = (found, torch.cat([twin.detach(), other.momentum(twin)]))
""",
    "a column under the next kernel": """
base = torch.randn(9, 2); param = torch.nn.Parameter(base[:, 0]); before = base[:, 1].clone()
optimizer = LARS([param], lr=0.5, kernel=kernel); param.grad = torch.ones(9)
optimizer.step(); optimizer.step()
result = (base[:, 1], before)
""",
}


def run(kernel, program):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, kernel], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_that_do_not_fit_are_refused_by_name(kernel):
    program = "answers = {}\n" + "".join(
        f"{code}\nanswers[{name!r}] = result\n" for name, (code, _) in REFUSED.items()
    )
    found = run(kernel, program + "print(json.dumps(answers))")
    for name, (_, message) in REFUSED.items():
        assert message in found[name], name
        assert len(found[name].splitlines()) == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_changed_under_the_same_object_is_noticed(kernel):
    program = "answers = {}\n" + "".join(
        f"{code}\nanswers[{name!r}] = ((result[0] - result[1]).norm() / result[1].norm()).item()\n"
        for name, code in EQUAL.items()
    )
    found = run(kernel, program + "print(json.dumps(answers))")
    assert {name: distance for name, distance in found.items() if not distance < 1e-6} == {}
