"""Make ranks hold the same bits, and prove that they do.

Horovod's ``broadcast_optimizer_state`` is not used: if a rank's state is empty, it takes an
optimizer step with zero gradients, and weight decay moves that rank's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Communicator
from hvd_lars.runtime.joined import is_expanded

_PACK = 2**22  # bytes of small tensors sent together


class ReplicasDifferError(RuntimeError):
    """Ranks that must hold the same bits do not."""


def broadcast_and_verify(state: Mapping[str, Tensor], comm: Communicator, root: int = 0) -> None:
    """Copy rank ``root``'s tensors to every rank, then check that all hold the same bits."""
    packed: list[Tensor] = []
    for tensor in state.values():
        if packed and (
            packed[0].device != tensor.device or sum(map(_bytes, packed)) + _bytes(tensor) > _PACK
        ):
            _broadcast_together(packed, comm, root)
            packed = []
        packed.append(tensor)
    if packed:
        _broadcast_together(packed, comm, root)
    verify_agreement(state, comm)


def _broadcast_together(tensors: Sequence[Tensor], comm: Communicator, root: int) -> None:
    """Broadcast small tensors at once: each one alone would cost a cycle of Horovod."""
    if len(tensors) == 1:
        comm.broadcast(tensors[0], root)
        return
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    together = torch.cat(flat)
    comm.broadcast(together, root)
    sizes = [part.numel() for part in flat]
    for tensor, part in zip(tensors, torch.split(together, sizes), strict=True):
        # A copy, which is aligned for the dtype.
        tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def verify_agreement(state: Mapping[str, Tensor], comm: Communicator) -> None:
    """Compare a checksum of every tensor across the ranks.

    Raises:
        ReplicasDifferError: on every rank, naming the first tensor that differs and the ranks
            where it differs from rank 0's.
    """
    mine = torch.tensor([_checksum(tensor) for tensor in state.values()], dtype=torch.int64)
    roots = mine.clone()
    comm.broadcast(roots)
    differs = torch.zeros(comm.size, len(state), dtype=torch.int64)
    differs[comm.rank] = mine != roots
    comm.start_all_reduce_sum(differs, "verify_agreement").wait()
    tensors = differs.any(dim=0).nonzero().flatten().tolist()
    if tensors:
        ranks = differs[:, tensors[0]].nonzero().flatten().tolist()
        raise ReplicasDifferError(
            f"{list(state)[tensors[0]]} differs from rank 0's on ranks {ranks} "
            f"({len(tensors)} of {len(state)} tensors differ)"
        )


def _checksum(tensor: Tensor) -> int:
    """Return 64 bits of BLAKE2b over the tensor's bytes, as a signed integer."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(data.data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def average_buffers(model: nn.Module, comm: Communicator) -> None:
    """Replace floating-point and complex buffers (running statistics) by their mean over ranks.

    Each rank gathers statistics of its own samples; evaluation and checkpoints need one model.
    Ranks whose layer has seen no batch, as with more ranks than samples in a step, do not count.
    """
    if comm.size == 1:
        return
    statistics = [
        (torch.view_as_real(buffer) if buffer.is_complex() else buffer, _has_seen(module))
        for module in model.modules()
        for buffer in module.buffers(recurse=False)
        if (buffer.is_floating_point() or buffer.is_complex())
        and not is_expanded(buffer)  # those are constants
    ]
    if not statistics:
        return
    # One sum for all: a hundred small ones take a tenth of a second.
    parts = [
        torch.cat([buffer.detach().flatten().double() * seen, seen.reshape(1)])
        for buffer, seen in statistics
    ]
    sizes = [part.numel() for part in parts]
    total = torch.cat(parts)
    comm.start_all_reduce_sum(total, "buffers").wait()
    for part, (buffer, _) in zip(torch.split(total, sizes), statistics, strict=True):
        mean = (part[:-1] / part[-1]).view_as(buffer).to(buffer.dtype)
        # Where no rank has seen a batch, all hold the initial values.
        buffer.copy_(torch.where(part[-1] > 0, mean, buffer))


def _has_seen(module: nn.Module) -> Tensor:
    """Return 1 if a module's statistics have seen a batch, else 0, as 0-dim float64."""
    counter: Tensor | None = getattr(module, "num_batches_tracked", None)
    if counter is None:
        device = next(module.buffers(recurse=False)).device
        return torch.ones((), dtype=torch.float64, device=device)
    return (counter > 0).double()
