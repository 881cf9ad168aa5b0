"""What is leaned on in torch without a promise: these fail where torch changes it."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_lars.runtime import torch_internals
from hvd_lars.runtime.torch_internals import at_end_of_backward, enclosing_node

NO_DYNAMO = """
import sys, torch
from hvd_lars import LARS
param = torch.nn.Parameter(torch.ones(3, 2))
optimizer = LARS([param])
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
param.grad = torch.ones(3, 2)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""


def test_an_optimizers_life_imports_no_compiler():
    assert subprocess.run([sys.executable, "-c", NO_DYNAMO], check=False).returncode == 0


def test_unwrapped_methods_are_torchs_own():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.SGD(params[:1], lr=1.0, momentum=0.9)
    torch_internals.add_param_group(optimizer, {"params": params[1:], "lr": 2.0})
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert str(torch_internals.state_dict(optimizer)) == str(optimizer.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["momentum_buffer"].fill_(7.0)
    heard = []
    torch_internals.before_loading(optimizer, lambda *_: heard.append("before"))
    torch_internals.after_loading(optimizer, lambda *_: heard.append("after"), prepend=True)
    torch_internals.load_state_dict(optimizer, state)
    assert heard == ["before", "after"]
    assert optimizer.state[params[1]]["momentum_buffer"].tolist() == [7.0] * 3
    torch_internals.zero_grad(optimizer)
    assert params[0].grad is None


def test_versions_count_what_is_written_in_place_but_not_through_data():
    tensor = torch.zeros(3)
    (before,) = torch_internals.versions_of([tensor])
    tensor.add_(1.0)
    tensor[:1].zero_()
    assert torch_internals.versions_of([tensor]) == [before + 2]
    tensor.data.add_(1.0)
    assert torch_internals.versions_of([tensor]) == [before + 2]
    torch.autograd.graph.increment_version(tensor)
    assert torch_internals.versions_of([tensor]) == [before + 3]


def test_the_end_of_backward_is_when_every_gradient_is_there():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    seen = []

    def hook(_):
        if not seen:
            seen.append("hook")
            torch_internals.at_end_of_backward(
                lambda: seen.append([param.grad is not None for param in params])
            )

    for param in params:
        param.register_post_accumulate_grad_hook(hook)
    (params[0] * params[1]).sum().backward()
    assert seen == ["hook", [True, True]]


def test_an_exception_at_the_end_of_backward_reaches_its_caller():
    param = nn.Parameter(torch.ones(3))
    param.register_post_accumulate_grad_hook(
        lambda _: torch_internals.at_end_of_backward(lambda: 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        param.sum().backward()


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_an_uncompiled_step_is_not_traced():
    seen = []

    @torch_internals.uncompiled
    def step():
        seen.append(torch.compiler.is_compiling())

    torch.compile(lambda x: (x + 1, step()))(torch.ones(2))
    step()
    assert seen == [False, False]


def test_a_replaced_forward_runs_inside_the_hooks_and_follows_a_copy():
    module = nn.Linear(2, 2)
    names = list(module.state_dict())
    torch_internals.replace_forward(module, lambda self, x: (self, x + 1))
    heard = []
    module.register_forward_hook(lambda *_: heard.append("hook"))
    twin = copy.deepcopy(module)
    for each in (module, twin):
        assert each(1)[0] is each
    assert heard == ["hook", "hook"]
    assert list(module.state_dict()) == names


def test_statistics_in_copies_leave_the_norms_as_they_were():
    norm = nn.BatchNorm1d(3)
    tensors = dict(norm.named_buffers())
    before = copy.deepcopy(norm.state_dict())
    with torch_internals.statistics_in_copies([norm]):
        norm(torch.randn(8, 3))
        assert not torch.equal(norm.running_mean, before["running_mean"])
    assert all(tensors[name] is tensor for name, tensor in norm.named_buffers())
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


def test_fused_sgd_is_the_rule_that_the_fused_kernel_folds_lars_into():
    w, g, v = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    buffer = 0.3 * v + (1 - 0.2) * (g + 0.01 * w)
    wanted = w - 0.5 * buffer
    torch_internals.fused_sgd_(
        [w], [g], [v], weight_decay=0.01, momentum=0.3, lr=0.5, dampening=0.2,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip
    torch.testing.assert_close(v, buffer)
    torch.testing.assert_close(w, wanted)


def test_a_backward_pass_knows_the_node_that_runs_it():
    seen, hooked = [], []

    def note(_):
        at_end_of_backward(lambda: seen.append(enclosing_node()))

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.register_post_accumulate_grad_hook(note)
    found = checkpoint(model[1], model[0](torch.ones(1, 3)), use_reentrant=True).sum()
    found.grad_fn.next_functions[0][0].register_hook(lambda *_: hooked.append(len(seen)))
    found.backward()
    assert [node is None for node in seen] == [False]
    assert hooked == [1]  # after the inner pass
    model(torch.ones(1, 3)).sum().backward()
    assert seen[1] is None
