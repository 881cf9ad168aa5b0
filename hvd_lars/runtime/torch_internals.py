"""Parts of torch that its documentation does not promise, each with the reason it is used.

``tests/test_torch_internals.py`` fails where torch changes one of them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

# Methods of Optimizer without the decorator that imports torch._dynamo: 1.5 s of every start.
add_param_group = inspect.unwrap(Optimizer.add_param_group)
zero_grad = inspect.unwrap(Optimizer.zero_grad)
state_dict = inspect.unwrap(Optimizer.state_dict)
load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
before_loading = inspect.unwrap(Optimizer.register_load_state_dict_pre_hook)
after_loading = inspect.unwrap(Optimizer.register_load_state_dict_post_hook)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_version = attrgetter("_version")

# One pass over weight, gradient and momentum; torch.optim.SGD(fused=True) calls it, too, but with
# one rate and one weight decay for many tensors, where LARS has a rate for each.
fused_sgd_ = torch._fused_sgd_


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was written in place, as autograd counts; not through ``.data``.

    It tells a weight that somebody edited from one that the step before left, without a pass
    over memory.
    """
    return list(map(_version, tensors))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call it when the backward pass under way has computed every gradient, before it returns.

    No hook of a parameter tells that others will not follow; FSDP and DDP do the same.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def uncompiled(method: _Function) -> _Function:
    """Run ``method`` outside the graph where ``torch.compile`` traces the caller.

    It works on addresses, which graphs lack.
    """

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return _disabled(method, args, kwargs)
        return method(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _disabled(method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return torch.compiler.disable(method)(*args, **kwargs)  # type: ignore[no-untyped-call]


# What torch.compiler.disable sets, without the import of torch._dynamo that calling it makes.
_disabled._torchdynamo_disable = True  # type: ignore[attr-defined]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``module(...)`` call ``forward(module, ...)``, inside the module's hooks.

    A wrapping module would change the names in ``state_dict``.  A deep copy's is bound to the copy.
    """
    module.forward = MethodType(forward, module)


@contextmanager
def statistics_in_copies(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let BatchNorms count what they see inside in copies of their running statistics.

    Assigning the attributes would do it, too, with torch's checks for each at every block.
    """
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
