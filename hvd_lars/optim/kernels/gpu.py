"""The Triton kernels over lists of tensors.

Nothing here waits for the device: tables of addresses are copied to it, and again only when a
tensor has moved, so a step can be captured in a CUDA graph after one or two uncaptured steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.optim.kernels.block import Block, KnownRatios, RatioInputs, Ratios, Scale, Tabled
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.norms import sums_of_squares
from hvd_lars.runtime.readback import Constant, send, table_of

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDE = (16, 8)  # alignment that wide loads need: of addresses in bytes, of positions in elements

Part = tuple[int, int]
_dtype, _row = attrgetter("dtype"), attrgetter("row")


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
            ratios = torch.full((3,), 0.1, dtype=torch.float64, device=device)
            each.update(blocks, KnownRatios(ratios), 1.0)
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
        tables = tensors.tables if isinstance(tensors, Tabled) else None
        if tables is None:
            dtypes = set(map(_dtype, tensors))
            if (
                len(dtypes) != 1
                or not dtypes.issubset(_DTYPES)
                or not all(map(Tensor.is_contiguous, tensors))
            ):
                return sums_of_squares(tensors)
            addresses = tuple(map(Tensor.data_ptr, tensors))
            place = (addresses, tuple(map(Tensor.numel, tensors)), tensors[0].device)
            tables = _sums_tables(place, self._triton.CHUNK)
            if isinstance(tensors, Tabled):
                tensors.tables = tables
        dtype, language = tensors[0].dtype, self._triton.tl
        sums = tables.new_sums()
        if tables.programs:
            # Triton launches on the current device.
            with torch.cuda.device_of(sums):  # type: ignore[no-untyped-call]
                self._triton.sums_kernel[(tables.programs,)](
                    tables.chunks,
                    tables.layers,
                    tables.partials,
                    tables.arrived,
                    sums,
                    DTYPE=_triton_type(language, dtype),
                    WIDE=language.float64 if dtype == torch.float64 else language.float32,
                    ALIGNED=tables.aligned,
                    CHUNK=self._triton.CHUNK,
                    FOLD=self._triton.FOLD,
                )
        return sums

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Ratios,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> tuple[None, Tensor] | None:
        """Update in place; return no sums if a block was updated eagerly."""
        inputs = ratios.inputs
        device = ratios.values.device if inputs is None else inputs.sums.device
        plan = blocks.tables if isinstance(blocks, Tabled) else None
        if not isinstance(plan, _Plan) or not plan.renewed_for(blocks, inputs):
            plan = _Plan(blocks, inputs, self._triton.CHUNK, device)
            if isinstance(blocks, Tabled):
                blocks.tables = plan
        factors = (
            unscale.to(device) if isinstance(unscale, Tensor)
            else plan.unscale.of((float(unscale),), device),
            plan.one.of((1.0,), device) if live is None else live.to(device),
        )  # fmt: skip
        if len(plan.launches) == 1 and not plan.eager:
            after = self._launch(plan.launches[0], ratios, factors)
        else:
            after = torch.zeros(len(blocks), dtype=torch.float64, device=device)
            for launch in plan.launches:
                after[launch.places] = self._launch(launch, ratios, factors)
        if plan.eager and (live is None or live):  # the latter waits for the device
            chosen = [blocks[i] for i in plan.eager]
            of_chosen = KnownRatios(ratios.values[plan.eager])
            EagerKernel(on_host=False).update(chosen, of_chosen, float(unscale))
        torch.autograd.graph.increment_version(plan.written)  # autograd does not see Triton
        return None if plan.eager else (None, after)

    def _launch(self, launch: _Launch, ratios: Ratios, factors: tuple[Tensor, Tensor]) -> Tensor:
        """Update blocks of one kind and return the new weights' sums of squares."""
        language, tables, first = self._triton.tl, launch.tables, launch.first
        sums, inputs = tables.new_sums(), ratios.inputs
        given = ratios.values[launch.places] if inputs is None else inputs.sums
        if tables.programs:
            with torch.cuda.device_of(sums):  # type: ignore[no-untyped-call]
                self._triton.update_kernel[(tables.programs,)](
                    tables.chunks,
                    tables.layers,
                    _rules(launch, sums.device),
                    given,
                    given if inputs is None else inputs.constants,
                    0 if inputs is None else len(inputs.constants),
                    *factors,
                    tables.partials,
                    tables.arrived,
                    sums,
                    WEIGHT=_triton_type(language, first.weight.dtype),
                    GRADIENT=_triton_type(language, first.gradient.dtype),
                    HAS_BUFFER=first.buffer is not None,
                    HAS_COPY=first.copy is not None,
                    NESTEROV=launch.nesterov,
                    HAS_RATIOS=inputs is None,
                    IS_SCALED=inputs is not None and inputs.is_scaled,
                    ALIGNED=tables.aligned,
                    CHUNK=self._triton.CHUNK,
                    FOLD=self._triton.FOLD,
                )
        return sums


@final
class _Tables:
    """A launch's tables and scratch on the device, valid as long as the tensors stay there."""

    def __init__(
        self,
        rows: Sequence[tuple[int, ...]],
        parts: tuple[tuple[int, Part], ...],
        members: Sequence[tuple[int, int]],
        size: int,
        device: torch.device,
    ) -> None:
        self.chunks, slots, num_slots = _chunks(parts, size, device)
        self.programs = len(self.chunks)
        table = [
            (*row, *slot, *member) for row, slot, member in zip(rows, slots, members, strict=True)
        ]
        self.layers = table_of(table, np.int64, device)
        self.partials = torch.empty(num_slots, dtype=torch.float64, device=device)
        self.arrived = torch.zeros(len(rows), dtype=torch.int32, device=device)  # also after use
        self.aligned = _aligned(rows, parts)
        self._new = torch.empty if all(begin < end for _, (begin, end) in parts) else torch.zeros

    def new_sums(self) -> Tensor:
        """Return memory for the sums, (layers,) float64; zeros for layers without a program."""
        return self._new(len(self.arrived), dtype=torch.float64, device=self.arrived.device)


_Place = tuple[tuple[int, ...], tuple[int, ...], torch.device]


@functools.lru_cache(maxsize=256)
def _sums_tables(place: _Place, size: int) -> _Tables:
    """Return the tables for tensors by their addresses, sizes and device."""
    addresses, sizes, device = place
    rows = [(address, 0, 0, 0) for address in addresses]
    parts = tuple((numel, (0, numel)) for numel in sizes)
    return _Tables(rows, parts, [(0, 0)] * len(rows), size, device)


@final
class _Launch:
    """Blocks of one kind, which share a launch."""

    def __init__(
        self,
        blocks: Sequence[Block],
        members: list[int],
        source_of: Sequence[int],
        size: int,
        device: torch.device,
    ) -> None:
        self.members = members
        self.places = table_of(members, np.int64, device)
        chosen = [blocks[i] for i in members]
        groups = {id(block.group): block.group for block in chosen}
        numbers = {key: number for number, key in enumerate(groups)}
        self.first, self.groups = chosen[0], list(groups.values())
        self.nesterov = bool(self.first.group["nesterov"])
        self.rules = Constant()
        self._size, self._device = size, device
        self._parts = tuple((block.weight.numel(), block.norm_part) for block in chosen)
        self._of = [(numbers[id(blocks[i].group)], source_of[i]) for i in members]
        self.renew([block.addresses() for block in chosen])

    def renew(self, addresses: Sequence[tuple[int, ...]]) -> None:
        """Take other addresses of the same blocks."""
        self.tables = _Tables(addresses, self._parts, self._of, self._size, self._device)


@final
class _Plan:
    """The launches that update a list of blocks."""

    def __init__(
        self,
        blocks: Sequence[Block],
        inputs: RatioInputs | None,
        size: int,
        device: torch.device,
    ) -> None:
        self._source_of = None if inputs is None else inputs.source_of
        sources = [-1] * len(blocks) if inputs is None else inputs.source_of
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, block in enumerate(blocks):
            kinds.setdefault(_kind(block), []).append(i)
        self.eager = kinds.pop((), [])
        self.launches = [_Launch(blocks, each, sources, size, device) for each in kinds.values()]
        self.one, self.unscale = Constant(), Constant()
        taken = [blocks[i] for launch in self.launches for i in launch.members]
        for block in taken:
            if block.row is None:
                block.row = (*block.addresses(), block.weight.numel(), 0, *block.norm_part)
        written = [tensor for block in taken for tensor in (block.weight, block.copy)]
        self.written = [tensor for tensor in written if tensor is not None]
        self._rows = list(map(_row, blocks))

    def renewed_for(self, blocks: Sequence[Block], inputs: RatioInputs | None) -> bool:
        """Take moved gradients of the same blocks; return whether the plan holds for these blocks.

        Blocks that changed otherwise have lost their row.
        """
        if self._source_of is not (None if inputs is None else inputs.source_of):
            return False
        rows = list(map(_row, blocks))
        if rows != self._rows:
            if not all(map(_differ_in_gradient, rows, self._rows)):
                return False
            for launch in self.launches:
                launch.renew([rows[i][:4] for i in launch.members])
            self._rows = rows
        return all(
            bool(group["nesterov"]) == launch.nesterov
            for launch in self.launches
            for group in launch.groups
        )


def _differ_in_gradient(now: tuple[int, ...] | None, then: tuple[int, ...] | None) -> bool:
    """Return whether two rows are of one block, whose gradient alone may have moved."""
    if now is None or then is None:
        return now is then
    return now[0] == then[0] and now[2:] == then[2:]


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


def _rules(launch: _Launch, device: torch.device) -> Tensor:
    """Return the (groups, 5) float64 table of triton_kernels; γ may be a device tensor."""
    rows, late = [], []
    for i, group in enumerate(launch.groups):
        lr, inside = group["lr"], group["lr_position"] == "momentum"
        if isinstance(lr, Tensor):
            late.append((i, 2 if inside else 3, lr))
            lr = 1.0
        skip = float(group["zero_norm"] == "skip")
        both = (lr, 1.0) if inside else (1.0, lr)
        rows.append((float(group["momentum"]), float(group["weight_decay"]), *both, skip))
    table = launch.rules.of(tuple(rows), device)
    if late:
        table = table.clone()
        for i, column, lr in late:
            table[i, column] = lr
    return table


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
    return send(torch.from_numpy(np.concatenate(tables)), device), slots, slot
