"""The C++ kernels of native.cpp through ctypes.

setup.py builds them if there is a compiler.  They use the OpenMP runtime that torch has already
loaded, so that both share one set of threads.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.optim.kernels.block import Block, Ratios, Scale, is_skipped, rates
from hvd_lars.optim.kernels.eager import update_on_host
from hvd_lars.optim.norms import sums_of_squares

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def why_not_loaded() -> str:
    """Return why the library cannot be used here; empty if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


@functools.cache
def _load() -> ctypes.CDLL | str:
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return "its library was not built (no C++ compiler when hvd_lars was installed)"
    try:
        ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(found[0]))
        for function in (library.hvd_lars_sums, library.hvd_lars_update):
            function.restype = None
    except (OSError, AttributeError) as error:
        return f"{found[0]} cannot be loaded: {error}"
    return library


def _openmp_runtime() -> str:
    """Return torch's OpenMP library; code compiled by GCC works with any of the three runtimes."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        mapped = ""
    match = re.search(r"/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*", mapped)
    return match.group() if match else "libgomp.so.1"


@final
class NativeKernel:
    """Reads every gradient once for the norms, and weight, gradient and momentum once to update.

    The update also returns the weights' sums of squares.  Blocks with gaps in memory, or with
    dtypes that native.cpp does not support, are updated eagerly.  See :class:`Kernel` for the
    methods.
    """

    name = "native"

    def __init__(self) -> None:
        library = _load()
        assert not isinstance(library, str), library
        self._sums, self._update = library.hvd_lars_sums, library.hvd_lars_update

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sums of squares."""
        if not all(tensor.is_contiguous() and tensor.dtype in _KINDS for tensor in tensors):
            return sums_of_squares(tensors)
        rows = [(0, t.data_ptr(), 0, 0, t.numel(), _KINDS[t.dtype], 0, 0) for t in tensors]
        sums = np.empty(len(rows))
        _call(self._sums, np.array(rows, dtype=np.int64).reshape(-1, 8), sums)
        return torch.from_numpy(sums)

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Ratios,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Update in place; return no sums if a block was skipped or updated eagerly."""
        if live is not None and not live:
            return None
        rules = {id(block.group): block.group for block in blocks}
        skips = any(group["zero_norm"] == "skip" for group in rules.values())
        unscale = float(unscale)
        taken, scales = _taken(blocks, ratios.values.numpy(), unscale, skips)
        if not taken:
            return None
        table = np.array([block.row for block in taken], dtype=np.int64)
        numbers = dict(zip(rules, range(len(rules)), strict=True))
        coefficients = np.array(
            [_coefficients(g, unscale) for g in rules.values()], dtype=np.float64
        )
        rows = coefficients[[numbers[id(block.group)] for block in taken]]
        rows[:, 2] *= scales
        sums = np.empty((len(taken), 2))
        _call(self._update, table, rows, sums)
        written = [b.weight for b in taken] + [b.copy for b in taken if b.copy is not None]
        torch.autograd.graph.increment_version(written)  # autograd does not see ctypes' writes
        if len(taken) < len(blocks):
            return None
        before, after = torch.from_numpy(sums).unbind(1)
        return before, after


def _taken(
    blocks: Sequence[Block], ratios: np.ndarray[Any, Any], unscale: float, skips: bool
) -> tuple[Sequence[Block], np.ndarray[Any, Any]]:
    """Return the blocks for the kernel, with their λ; update the others eagerly."""
    if all([block.row or _has_row(block) for block in blocks]) and not (
        skips and any(map(is_skipped, blocks, ratios))
    ):
        return blocks, ratios
    kept = []
    for i, (block, ratio) in enumerate(zip(blocks, ratios.tolist(), strict=True)):
        if is_skipped(block, ratio):
            continue
        if _has_row(block):
            kept.append(i)
        else:
            update_on_host(block, ratio, unscale)
    return [blocks[i] for i in kept], ratios[kept]


def _coefficients(group: dict[str, Any], unscale: float) -> tuple[float, ...]:
    """Return ``Coefficients`` of native.cpp, without the ratio."""
    inside, outside = rates(group)
    momentum, decay, nesterov = group["momentum"], group["weight_decay"], group["nesterov"]
    return momentum, decay, inside, outside, nesterov, unscale


def _has_row(block: Block) -> bool:
    """Return whether the kernel can take the block; sets its row, ``Layer`` in native.cpp."""
    if block.row is None and _fits(block):
        block.check()  # C trusts the length
        size, kind = block.weight.numel(), _KINDS[block.gradient.dtype]
        block.row = (*block.addresses(), size, kind, *block.norm_part)
    return block.row is not None


def _fits(block: Block) -> bool:
    """Return whether all dtypes match, or a half gradient and parameter have a float32 master."""
    if not block.is_flat:
        return False
    if block.buffer is not None and block.buffer.dtype != block.weight.dtype:
        return False
    if block.copy is None:
        return block.gradient.dtype == block.weight.dtype in (torch.float32, torch.float64)
    half = block.gradient.dtype == block.copy.dtype in (torch.bfloat16, torch.float16)
    return half and block.weight.dtype == torch.float32


def _call(function: Any, table: np.ndarray[Any, Any], *rest: np.ndarray[Any, Any]) -> None:
    """Pass (layers, 8) int64 rows and float64 arrays to C, which runs without the GIL."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (table, *rest)]
    threads = ctypes.c_int(torch.get_num_threads())
    function(pointers[0], ctypes.c_int64(len(table)), *pointers[1:], threads)
