"""The Triton kernels over lists of tensors.

Nothing here waits for the device: tables of addresses are copied to it once and stay valid as long
as the tensors, so a step can be captured in a CUDA graph after one or two uncaptured steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.optim.kernels.block import Block, Scale
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.norms import sums_of_squares

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDE = (16, 8)  # alignment that wide loads need: of addresses in bytes, of positions in elements

Part = tuple[int, int]


def why_not_gpu() -> str:
    """Return why the kernels cannot be used on the GPU here; empty if they can."""
    return try_on(torch.device("cuda"))


@functools.cache
def try_on(device: torch.device) -> str:
    """Compile both kernels and compare them with plain torch on a few numbers."""
    try:
        kernel, plain = GpuKernel(), EagerKernel(on_host=False)
        ends = []
        for each in (kernel, plain):
            generator = torch.Generator().manual_seed(0)
            weights, gradients, buffers = (
                [torch.randn(n, generator=generator).to(device) for n in (1, 5000, 9001)]
                for _ in range(3)
            )
            group: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-3, "lr": 1.0}
            group |= {"nesterov": False, "lr_position": "momentum", "zero_norm": "unit"}
            blocks = [
                Block(w, g, v, None, group, {}, (0, len(w)))
                for w, g, v in zip(weights, gradients, buffers, strict=True)
            ]
            each.update(blocks, torch.full((3,), 0.1, dtype=torch.float64, device=device), 1.0)
            ends.append(torch.cat([*weights, *buffers, each.sums_of_squares(weights).float()]))
        same = torch.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    except Exception as error:  # whatever Triton, its compiler or the driver may raise
        return f"Triton does not run here: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return "" if same else "Triton's results differ from torch's here"


@final
class GpuKernel:
    """Moves 28 bytes per float32 parameter: sums read w, g; the update reads w, g, v, writes w, v.

    The update also sums the squares of the weights that it writes.  Blocks with gaps in memory are
    updated eagerly.  See :class:`Kernel` for the methods.

    Raises:
        ImportError: Triton is not installed.
    """

    name = "native"

    def __init__(self) -> None:
        self._triton = _kernels()

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sums of squares."""
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) != 1 or not all(map(_fits, tensors)):
            return sums_of_squares(tensors)
        device, dtype = tensors[0].device, dtypes.pop()
        rows = tuple((tensor.data_ptr(), 0, 0, 0) for tensor in tensors)
        parts = tuple((tensor.numel(), (0, tensor.numel())) for tensor in tensors)
        language = self._triton.tl
        sums, programs, arguments = self._prepare(rows, parts, (0,) * len(rows), device)
        if programs:
            self._triton.sums_kernel[(programs,)](
                *arguments,
                sums,
                DTYPE=_triton_type(language, dtype),
                WIDE=language.float64 if dtype == torch.float64 else language.float32,
                ALIGNED=_aligned(rows, parts),
                CHUNK=self._triton.CHUNK,
                FOLD=self._triton.FOLD,
            )
        return sums

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Tensor,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> tuple[None, Tensor] | None:
        """Update in place; return no sums if a block was updated eagerly."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault(_kind(block), []).append(i)
        factors = torch.ones(2, dtype=torch.float64, device=ratios.device)
        factors[0] = unscale
        if live is not None:
            factors[1] = live
        after = torch.zeros_like(ratios)
        for kind, members in kinds.items():
            chosen = [blocks[i] for i in members]
            if len(members) == len(blocks):
                index: Any = slice(None)
            else:
                index = _on_device(tuple(members), ratios.device)
            if kind:
                after[index] = self._launch(chosen, ratios[index], factors)
            else:
                _update_eagerly(chosen, ratios[index], factors)
        return (None, after) if () not in kinds else None

    def _launch(self, blocks: Sequence[Block], ratios: Tensor, factors: Tensor) -> Tensor:
        """Update blocks of one kind and return the new weights' sums of squares."""
        groups = {id(block.group): block.group for block in blocks}
        numbers = {key: number for number, key in enumerate(groups)}
        rows = tuple(
            tuple(
                0 if tensor is None else tensor.data_ptr()
                for tensor in (block.weight, block.gradient, block.buffer, block.copy)
            )
            for block in blocks
        )
        parts = tuple((block.weight.numel(), block.norm_part) for block in blocks)
        members = tuple(numbers[id(block.group)] for block in blocks)
        sums, programs, arguments = self._prepare(rows, parts, members, ratios.device)
        ratios = ratios.contiguous()
        first, language = blocks[0], self._triton.tl
        if programs:
            self._triton.update_kernel[(programs,)](
                *arguments[:2],
                _rules(list(groups.values()), ratios.device),
                ratios,
                factors,
                *arguments[2:],
                sums,
                WEIGHT=_triton_type(language, first.weight.dtype),
                GRADIENT=_triton_type(language, first.gradient.dtype),
                HAS_BUFFER=first.buffer is not None,
                HAS_COPY=first.copy is not None,
                NESTEROV=bool(first.group["nesterov"]),
                ALIGNED=_aligned(rows, parts),
                CHUNK=self._triton.CHUNK,
                FOLD=self._triton.FOLD,
            )
        for block in blocks:  # autograd does not see Triton's writes
            torch.autograd.graph.increment_version(block.weight)
            if block.copy is not None:
                torch.autograd.graph.increment_version(block.copy)
        return sums

    def _prepare(
        self,
        rows: tuple[tuple[int, ...], ...],
        parts: tuple[tuple[int, Part], ...],
        members: tuple[int, ...],
        device: torch.device,
    ) -> tuple[Tensor, int, list[Tensor]]:
        """Return the output sums, the number of programs, and a launch's tables and scratch."""
        chunks, slots, num_slots = _chunks(parts, self._triton.CHUNK, device)
        layers = _on_device(
            tuple(
                (*row, *slot, member, 0)
                for row, slot, member in zip(rows, slots, members, strict=True)
            ),
            device,
        )
        sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
        partials = torch.empty(num_slots, dtype=torch.float64, device=device)
        arrived = torch.zeros(len(rows), dtype=torch.int32, device=device)
        return sums, len(chunks), [chunks, layers, partials, arrived]


def _kernels() -> ModuleType:
    from hvd_lars.optim.kernels import triton_kernels  # not every build of torch brings Triton

    return triton_kernels


def _triton_type(language: Any, dtype: torch.dtype) -> Any:
    return getattr(language, str(dtype).removeprefix("torch."))


def _aligned(rows: Sequence[tuple[int, ...]], parts: Sequence[tuple[int, Part]]) -> bool:
    """Return whether every chunk of every tensor is aligned for wide loads."""
    address, elements = _WIDE
    return not any(
        any(number % address for number in row) or any(n % elements for n in (numel, *part))
        for row, (numel, part) in zip(rows, parts, strict=True)
    )


def _fits(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.dtype in _DTYPES


def _kind(block: Block) -> tuple[Any, ...]:
    """Return a block's kind, () if the kernel cannot take it; a kind shares one launch."""
    tensors = [t for t in (block.weight, block.gradient, block.buffer, block.copy) if t is not None]
    if not all(map(_fits, tensors)):
        return ()
    if block.buffer is not None and block.buffer.dtype != block.weight.dtype:
        return ()
    if block.copy is not None and block.copy.dtype != block.gradient.dtype:
        return ()
    buffered, copied = block.buffer is not None, block.copy is not None
    return block.weight.dtype, block.gradient.dtype, buffered, copied, block.group["nesterov"]


def _rules(groups: list[dict[str, Any]], device: torch.device) -> Tensor:
    """Return the (groups, 5) float64 table of triton_kernels; γ may be a device tensor."""
    rows, late = [], []
    for i, group in enumerate(groups):
        lr, inside = group["lr"], group["lr_position"] == "momentum"
        if isinstance(lr, Tensor):
            late.append((i, 2 if inside else 3, lr))
            lr = 1.0
        skip = float(group["zero_norm"] == "skip")
        both = (lr, 1.0) if inside else (1.0, lr)
        rows.append((float(group["momentum"]), float(group["weight_decay"]), *both, skip))
    table = _on_device(tuple(rows), device)
    if late:
        table = table.clone()
        for i, column, lr in late:
            table[i, column] = lr
    return table


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[Any, ...], device: torch.device) -> Tensor:
    array = np.array(values)
    tensor = torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.lru_cache(maxsize=64)
def _chunks(
    parts: tuple[tuple[int, Part], ...], size: int, device: torch.device
) -> tuple[Tensor, list[Part], int]:
    """Return chunks of ``size`` elements, (programs, 4): layer, begin, end, slot; layers' slots.

    Chunks restart at the beginning and the end of the norm part, so that its sums cover the same
    elements in both kernels.
    """
    tables, slots, slot = [np.empty((0, 4), dtype=np.int64)], [], 0
    for layer, (numel, (begin, end)) in enumerate(parts):
        slots.append((slot, -(-(end - begin) // size)))
        for first, last in ((0, begin), (begin, end), (end, numel)):
            starts = np.arange(first, last, size, dtype=np.int64)
            table = np.full((len(starts), 4), -1, dtype=np.int64)
            table[:, 0], table[:, 1] = layer, starts
            table[:, 2] = np.minimum(starts + size, last)
            if (first, last) == (begin, end):
                table[:, 3] = slot + np.arange(len(starts))
                slot += len(starts)
            tables.append(table)
    together = torch.from_numpy(np.concatenate(tables))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    return together, slots, slot


def _update_eagerly(blocks: Sequence[Block], ratios: Tensor, factors: Tensor) -> None:
    """Update with the factors read on the host; waits for the device."""
    unscale, live = factors.tolist()
    if live:
        EagerKernel(on_host=False).update(blocks, ratios, unscale)
