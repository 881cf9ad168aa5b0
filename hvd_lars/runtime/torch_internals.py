"""Undocumented parts of torch, each with the reason it is used.

``tests/test_torch_internals.py`` fails if torch changes one of them.
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

# Methods of Optimizer without the decorator, which imports torch._dynamo: 1.5 s of every start.
add_param_group = inspect.unwrap(Optimizer.add_param_group)
zero_grad = inspect.unwrap(Optimizer.zero_grad)
state_dict = inspect.unwrap(Optimizer.state_dict)
load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
before_loading = inspect.unwrap(Optimizer.register_load_state_dict_pre_hook)
after_loading = inspect.unwrap(Optimizer.register_load_state_dict_post_hook)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_version = attrgetter("_version")

# One pass over weight, gradient and momentum.  torch.optim.SGD(fused=True) also calls it, but with
# one rate and weight decay for many tensors; LARS needs a rate for each.
fused_sgd_ = torch._fused_sgd_


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return autograd's count of in-place writes to each tensor; ``.data`` is not counted.

    It shows whether a weight was edited since the last step, without a pass over memory.
    """
    return list(map(_version, tensors))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the current backward pass has computed every gradient.

    Backward returns after it.  A parameter's hook cannot know whether others follow; FSDP and DDP
    do the same.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def enclosing_node() -> Any:
    """Return the node of a backward pass that runs the current one inside; None if none does.

    Checkpointing with ``use_reentrant=True`` does.  Its node takes hooks, called when it is done.
    """
    return torch._C._current_autograd_node()


def uncompiled(method: _Function) -> _Function:
    """Run ``method`` outside the graph when ``torch.compile`` traces the caller.

    The method works on addresses, which graphs lack.
    """

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return _disabled(method, args, kwargs)
        return method(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _disabled(method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return _made_disabled(method)(*args, **kwargs)


@functools.cache  # making one takes as long as a third of a step
def _made_disabled(method: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
    return made


# As torch.compiler.disable does, but without importing torch._dynamo.
_disabled._torchdynamo_disable = True  # type: ignore[attr-defined]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make ``module(...)`` call ``forward(module, ...)``, inside the module's hooks.

    A wrapping module would change the names in ``state_dict``.  In a deep copy of the module,
    ``forward`` is bound to the copy.
    """
    module.forward = MethodType(forward, module)


@contextmanager
def statistics_in_copies(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Make BatchNorms update copies of their running statistics inside.

    Assigning the attributes would work too, but runs torch's checks for each at every block.
    """
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
