"""The interface of a kernel, and the block of memory it updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Scale = float | Tensor
"""A factor: a number, or a 0-dim float64 tensor on the device of what it multiplies."""


@dataclass(slots=True)
class Block:
    """One layer, or this rank's part of it, in a step.

    Tensors are (n,), in memory order, and pair up element by element; only a parameter with gaps
    in memory keeps its shape.
    """

    weight: Tensor  # updated; the float32 master of a half-precision parameter
    gradient: Tensor
    buffer: Tensor | None  # momentum, like weight; None without momentum
    copy: Tensor | None  # the half-precision parameter, a rounded copy of its master
    group: dict[str, Any]
    state: dict[str, Any]
    norm_part: tuple[int, int]  # begin and end of the elements whose squares this rank sums
    # Addresses of the four tensors, and what else the kernel needs; None if out of date.
    row: tuple[int, ...] | None = None

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of weight, gradient, buffer and copy; 0 for none."""
        tensors = (self.weight, self.gradient, self.buffer, self.copy)
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)

    @property
    def is_flat(self) -> bool:
        """Whether all tensors are contiguous, so that their memory pairs up by element."""
        tensors = (self.weight, self.gradient, self.buffer, self.copy)
        return all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    def check(self) -> None:
        """Raise RuntimeError if the tensors, which kernels access by address, differ in size."""
        size = self.weight.numel()
        for name in ("gradient", "buffer", "copy"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None and tensor.numel() != size:
                raise RuntimeError(
                    f"LARS: {name} of {tuple(tensor.shape)} for a weight of "
                    f"{tuple(self.weight.shape)}"
                )
        begin, end = self.norm_part
        if not 0 <= begin <= end <= size:
            raise RuntimeError(f"LARS: norm of [{begin}, {end}) of a weight of {size} elements")


class Tabled(list[T]):
    """Blocks or tensors that are the same in many steps, and a kernel's tables for them.

    Tensors in it never move; blocks are compared.  The tables go with the list, and must not refer
    to it.
    """

    tables: Any = None


@dataclass(frozen=True, slots=True)
class RatioInputs:
    """What a kernel computes the blocks' λ from, as ``optim.ratios.trust_ratios`` does.

    Sources are the layers whose norms are known.

    Attributes:
        sums: (2 × sources,) float64, squares of the sources' weights, then of their gradients.
        constants: (sources, 5) float64: l, β, ε, λ where ‖g‖ = 0, λ where ‖w‖ = 0.
        source_of: each block's index among the sources; -1 for λ = 1.
        is_scaled: ``unscale`` is a factor of ‖g‖ that the sums do not include.
    """

    sums: Tensor
    constants: Tensor
    source_of: Sequence[int]
    is_scaled: bool


class Ratios(Protocol):
    """The blocks' λ, which may be computed when they are read."""

    @property
    def values(self) -> Tensor:
        """λ of every block, (blocks,) float64."""
        ...

    @property
    def inputs(self) -> RatioInputs | None:
        """For a kernel that computes λ itself; None if it must take the values."""
        ...


@dataclass(frozen=True, slots=True)
class KnownRatios:
    """λ of every block, (blocks,) float64."""

    values: Tensor
    inputs: None = None


class Kernel(Protocol):
    """Sums of squares and the LARS update, over many tensors of one device."""

    name: Any  # as KernelName has it

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum of squares of each tensor: (len(tensors),), float64, on their device."""
        ...

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Ratios,
        unscale: Scale,
        live: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | None:
        """Apply the momentum rule in place; ``ratios`` are the blocks' λ.

        g is the blocks' gradient times ``unscale``.  If ``live``, a 0-dim bool on their device, is
        False, nothing changes.

        With the rates a inside the buffer and b outside it, a·b = γλ:
        v ← μv + a(g + βw) and w ← w − b·v, Nesterov w ← w − b(μv + a(g + βw)).  λ = 0 in a group
        with ``zero_norm="skip"`` leaves the block and its buffer unchanged.  A λ of NaN makes the
        block and its buffer NaN.

        Returns:
            Sums of squares of the weights' norm parts before and after, (n,) float64 each,
            bitwise equal to those of ``sums_of_squares``.  None if the kernel would need another
            pass for them; None for the sums before if only those are not computed.
        """
        ...


def rates(group: dict[str, Any]) -> tuple[float, float]:
    """Return the factors a / λ inside the buffer and b outside it, by ``lr_position``."""
    lr = float(group["lr"])
    return (1.0, lr) if group["lr_position"] == "update" else (lr, 1.0)


def is_skipped(block: Block, ratio: float) -> bool:
    """Return whether a zero norm leaves the block unchanged."""
    return ratio == 0.0 and block.group["zero_norm"] == "skip"
