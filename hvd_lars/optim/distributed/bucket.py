"""A flat bucket of gradients, and how parameters are dealt into buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Pending
from hvd_lars.optim.distributed.absent import AbsentGradient
from hvd_lars.optim.distributed.shard_plan import fill_buckets

# Bytes of gradients that are copied in one call: on a GPU, whose launches cost the host, they need
# memory beside the bucket; on a CPU as long as they stay in a core's cache.
_TOGETHER, _CACHED = 16 * 2**20, 2**20


@dataclass(slots=True)
class Bucket:
    """Gradients of some parameters in one flat tensor, reduced as one message."""

    params: list[nn.Parameter]
    starts: list[int]  # of each parameter in flat
    sizes: list[int]  # of each parameter, in bytes
    flat: Tensor  # (numel,), padded with zeros
    views: list[Tensor]
    together: int  # bytes of gradients that wait to be copied at once
    absent: list[AbsentGradient] = field(default_factory=list)  # if no rank has whole sums
    fresh: set[int] = field(default_factory=set)  # positions whose view belongs to this window
    missing: set[int] = field(default_factory=set)  # positions still without a gradient
    waiting: list[int] = field(default_factory=list)  # positions whose gradient is to be copied
    waiting_bytes: int = 0
    pending: Pending | None = None


def adopt(bucket: Bucket, positions: Iterable[int]) -> None:
    """Replace ``param.grad`` by the bucket's views, with the same contents."""
    views, gradients = [], []
    for i in positions:
        param, view = bucket.params[i], bucket.views[i]
        gradient = param.grad
        bucket.fresh.add(i)
        if gradient is view:
            continue
        if gradient is None:
            view.zero_()
        elif gradient.is_sparse:
            raise RuntimeError(
                f"gradients are reduced dense; a parameter of shape {tuple(param.shape)} has a "
                f"sparse one"
            )
        elif gradient.data_ptr() != view.data_ptr() or gradient.stride() != view.stride():
            views.append(view)
            gradients.append(gradient)
        param.grad = view
    bucket.waiting, bucket.waiting_bytes = [], 0
    if views:
        torch._foreach_copy_(views, gradients)


def make_buckets(params: list[nn.Parameter], bucket_bytes: int, multiple: int) -> Iterator[Bucket]:
    """Yield buckets of one dtype and device each, in reverse order of the parameters."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for param in reversed(params):
        kinds.setdefault((param.dtype, param.device), []).append(param)
    for (dtype, device), members in kinds.items():
        sizes = [param.numel() * param.element_size() for param in members]
        for positions in fill_buckets(sizes, bucket_bytes):
            inside = [members[p] for p in positions]
            numel = sum(param.numel() for param in inside)
            flat = torch.zeros(-(-numel // multiple) * multiple, dtype=dtype, device=device)
            views, starts, start = [], [], 0
            for param in inside:
                views.append(flat.as_strided(param.shape, param.stride(), start))
                starts.append(start)
                start += param.numel()
            nbytes = [param.numel() * param.element_size() for param in inside]
            together = _TOGETHER if flat.is_cuda else _CACHED
            yield Bucket(inside, starts, nbytes, flat, views, together)
