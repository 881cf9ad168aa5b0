"""The two passes over memory of a LARS step on a GPU, in Triton.

Each program handles one chunk of a layer; a table on the device holds the chunks and the addresses
of the tensors, so that one launch covers all layers.  For sums of squares, each program writes the
sum of its chunk, and the last program of a layer to finish adds up the chunks in order, in float64.
A sum thus has the same bits in whatever order programs run, and needs no second launch.
"""

# ruff: noqa: N803 - Triton's compile-time arguments are written in capitals
from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096  # elements per program
FOLD = 1024  # chunk sums added at once


@triton.jit
def _complete(
    total,
    slot,
    first,
    count,
    layer,
    partials,
    arrived,
    sums,
    FOLD: tl.constexpr,
):
    """Store a chunk's sum; the layer's last program adds them up and resets the counter."""
    tl.store(partials + slot, total.to(tl.float64))
    tl.debug_barrier()  # the store comes before the counter, for all threads
    if tl.atomic_add(arrived + layer, 1) == count - 1:
        together = tl.zeros([FOLD], dtype=tl.float64)
        begin = 0
        while begin < count:  # Triton's interpreter has no range() of a loaded number
            at = begin + tl.arange(0, FOLD)
            together += tl.load(partials + first + at, mask=at < count, other=0.0, volatile=True)
            begin += FOLD
        tl.store(sums + layer, tl.sum(together, axis=0))
        tl.store(arrived + layer, 0)


@triton.jit
def _at(table, row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer in a column of the table's row."""
    pointer = tl.load(table + row * 8 + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _range(row, ALIGNED: tl.constexpr):
    """Return the beginning and end of a chunk."""
    begin, end = tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:
        begin, end = tl.multiple_of(begin, 8), tl.multiple_of(end, 8)
    return begin, end


@triton.jit
def sums_kernel(
    chunks,  # (programs, 4) int64: layer, begin, end, slot
    layers,  # (layers, 8) int64: address, …, first slot, number of slots
    partials,  # (slots,) float64
    arrived,  # (layers,) int32, zero before and after the launch
    sums,  # (layers,) float64
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Sum the squares of all layers of one dtype."""
    row = chunks + tl.program_id(0) * 4
    layer, slot = tl.load(row), tl.load(row + 3)
    begin, end = _range(row, ALIGNED)
    at = begin + tl.arange(0, CHUNK)
    x = tl.load(_at(layers, layer, 0, DTYPE, ALIGNED) + at, mask=at < end, other=0.0).to(WIDE)
    first, count = tl.load(layers + layer * 8 + 4), tl.load(layers + layer * 8 + 5)
    _complete(tl.sum(x * x, axis=0), slot, first, count, layer, partials, arrived, sums, FOLD)


@triton.jit
def _ratio(source, sums, constants, sources, factor, IS_SCALED: tl.constexpr):
    """Return λ as optim.ratios.trust_ratios does; 1 for the source -1."""
    has = source >= 0
    weight = tl.sqrt(tl.load(sums + source, mask=has, other=1.0))
    gradient = tl.sqrt(tl.load(sums + sources + source, mask=has, other=1.0))
    if IS_SCALED:
        gradient *= factor
    finite = (weight < float("inf")) & (gradient < float("inf"))
    weight, gradient = tl.where(finite, weight, 1.0), tl.where(finite, gradient, 1.0)
    row = constants + source * 5
    trust, decay = tl.load(row, mask=has, other=1.0), tl.load(row + 1, mask=has, other=0.0)
    eps = tl.load(row + 2, mask=has, other=0.0)
    at_zero = tl.load(row + 3, mask=has, other=1.0)
    at_zero_weight = tl.load(row + 4, mask=has, other=1.0)
    denominator = gradient + decay * weight + eps
    ratio = trust * weight / tl.where(denominator == 0.0, 1.0, denominator)
    ratio = tl.where(gradient == 0.0, at_zero, ratio)
    ratio = tl.where(weight == 0.0, at_zero_weight, ratio)
    ratio = tl.where(finite, ratio, float("nan"))
    return tl.where(has, ratio, 1.0)


@triton.jit(do_not_specialize=["sources"])
def update_kernel(
    chunks,  # as above; slot -1 outside the norm part
    layers,  # (layers, 8) int64: weight, gradient, buffer, copy, first slot, slots, group, source
    groups,  # (groups, 5) float64: μ, β, a / λ, b, 1 if λ = 0 skips a layer
    ratios,  # (layers,) float64: λ; if not HAS_RATIOS, sums of squares (2 * sources,)
    constants,  # (sources, 5) float64: l, β, ε, λ where the gradient is 0, and where the weight is
    sources,
    factor,  # one number, of the gradients
    alive,  # one bool or float64: 0 to skip every layer
    partials,
    arrived,
    sums,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_COPY: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_RATIOS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Update all layers of one kind and sum the squares of the new weights."""
    row = chunks + tl.program_id(0) * 4
    layer, slot = tl.load(row), tl.load(row + 3)
    begin, end = _range(row, ALIGNED)
    rule = groups + tl.load(layers + layer * 8 + 6) * 5
    unscale = tl.load(factor)
    if HAS_RATIOS:
        ratio = tl.load(ratios + layer)
    else:
        source = tl.load(layers + layer * 8 + 7)
        ratio = _ratio(source, ratios, constants, sources, unscale, IS_SCALED)
    live = (tl.load(alive) != 0) & ((ratio != 0.0) | (tl.load(rule + 4) == 0.0))
    momentum, decay = tl.load(rule).to(WEIGHT), tl.load(rule + 1).to(WEIGHT)
    scale = (ratio * tl.load(rule + 2)).to(WEIGHT)
    outside, unscale = tl.load(rule + 3).to(WEIGHT), unscale.to(WEIGHT)

    at = begin + tl.arange(0, CHUNK)
    inside, written = at < end, at < tl.where(live, end, begin)
    weights = _at(layers, layer, 0, WEIGHT, ALIGNED) + at
    w = tl.load(weights, mask=inside, other=0.0)
    g = tl.load(_at(layers, layer, 1, GRADIENT, ALIGNED) + at, mask=inside, other=0.0)
    step = scale * (g.to(WEIGHT) * unscale + decay * w)
    if HAS_BUFFER:
        buffers = _at(layers, layer, 2, WEIGHT, ALIGNED) + at
        v = momentum * tl.load(buffers, mask=inside, other=0.0) + step
        tl.store(buffers, v, mask=written)
        if NESTEROV:
            step += momentum * v
        else:
            step = v
    w = tl.where(written, w - outside * step, w)
    tl.store(weights, w, mask=written)
    if HAS_COPY:
        tl.store(_at(layers, layer, 3, GRADIENT, ALIGNED) + at, w.to(GRADIENT), mask=written)
    if slot >= 0:
        first, count = tl.load(layers + layer * 8 + 4), tl.load(layers + layer * 8 + 5)
        total = tl.sum(tl.where(inside, w * w, 0.0), axis=0)
        _complete(total, slot, first, count, layer, partials, arrived, sums, FOLD)
