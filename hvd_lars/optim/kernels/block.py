"""What a kernel works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(slots=True)
class Block:
    """One layer, or this rank's part of it, in a step.

    Tensors are (n,), in memory order, and pair up element by element; only a parameter with gaps
    in memory keeps its shape.
    """

    weight: Tensor  # what is updated: float32 masters where the parameter is of half precision
    gradient: Tensor
    buffer: Tensor | None  # momentum, like weight; None without momentum
    copy: Tensor | None  # the parameter of half precision that follows its master
    group: dict[str, Any]
    state: dict[str, Any]
    norm_part: tuple[int, int]  # begin and end of the elements whose squares this rank sums
    # The native kernel's Layer: addresses of the four tensors, sizes, …; None since one changed.
    row: tuple[int, ...] | None = None

    @property
    def is_flat(self) -> bool:
        """Whether all its tensors are gapless, so that their memory pairs up element by element."""
        tensors = (self.weight, self.gradient, self.buffer, self.copy)
        return all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    def check(self) -> None:
        """Raise RuntimeError where its tensors, which kernels take by address, do not pair up."""
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


class Kernel(Protocol):
    """Sums of squares and the LARS update, over many tensors of one device."""

    name: Any  # as KernelName has it

    def sums_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum of squares of each tensor: (len(tensors),), float64, on their device."""
        ...

    def update(
        self,
        blocks: Sequence[Block],
        ratios: Tensor,
        unscale: float,
        live: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor] | None:
        """Apply the momentum rule in place; ``ratios`` are the blocks' λ, (n,) float64.

        g is the blocks' gradient times ``unscale``.  Where ``live``, a 0-dim bool on their device,
        is False, everything stays as it is.

        With a the rate inside the buffer and b the rate outside it, a·b = γλ:
        v ← μv + a(g + βw) and w ← w − b·v, Nesterov w ← w − b(μv + a(g + βw)).  λ = 0 in a group
        with ``zero_norm="skip"`` leaves a block and its buffer as they are.  A λ that is not a
        number makes the block and its buffer that, too.

        Returns:
            Sums of squares of the weights' norm parts before and after, (n,) float64 each, where
            the kernel has them without another pass: the bits that ``sums_of_squares`` gives.
            None in place of those before where it does not look.
        """
        ...


def rates(group: dict[str, Any]) -> tuple[float, float]:
    """Factors of λ inside the buffer (a / λ) and of the buffer outside (b), by ``lr_position``."""
    lr = float(group["lr"])
    return (1.0, lr) if group["lr_position"] == "update" else (lr, 1.0)


def is_skipped(block: Block, ratio: float) -> bool:
    """Whether a zero norm leaves the block as it is."""
    return ratio == 0.0 and block.group["zero_norm"] == "skip"
