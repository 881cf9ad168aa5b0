"""The check that all ranks hold parameters of the same layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator

_Layout = list[tuple[tuple[int, ...], tuple[int, ...], str]]


def check_same_layout(params: Sequence[Tensor], comm: Communicator) -> None:
    """Compare shapes, strides, dtypes and order of the parameters over the ranks; collective.

    Raises:
        ValueError: on every rank; names the first rank that differs from rank 0, and how.
    """
    if comm.size == 1:
        return
    mine: _Layout = [(tuple(p.shape), p.stride(), str(p.dtype)) for p in params]
    digest = hashlib.blake2b(repr(mine).encode(), digest_size=8).digest()
    digests = torch.zeros(comm.size, dtype=torch.int64)
    digests[comm.rank] = int.from_bytes(digest, "little", signed=True)
    comm.start_all_reduce_sum(digests, "layout").wait()
    other = (digests != digests[0]).nonzero().flatten().tolist()
    if other:
        first, theirs = (comm.broadcast_object(mine, root) for root in (0, other[0]))
        raise ValueError(f"parameters of rank {other[0]} are not rank 0's: {_how(first, theirs)}")


def _how(first: _Layout, theirs: _Layout) -> str:
    if len(first) != len(theirs):
        return f"{len(theirs)} parameters there, {len(first)} on rank 0"
    i = next(i for i, (a, b) in enumerate(zip(first, theirs, strict=True)) if a != b)
    (shape, strides, dtype), (shape_0, strides_0, dtype_0) = theirs[i], first[i]
    return (
        f"number {i} is {shape} with strides {strides}, {dtype} there, but {shape_0} with strides "
        f"{strides_0}, {dtype_0} on rank 0 (another order, memory format or precision?)"
    )
