"""A run's position, without its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Progress:
    """All that a run needs, besides tensors, to resume with the same bits.

    Attributes:
        step: optimizer steps completed.
        samples: of these steps; not step · global batch if the global batch was changed.
        evaluation_due: whether the evaluation after ``step`` was interrupted.
        window_steps: steps since the last log line.
        window_losses: each rank's share of their losses, as last gathered.
        skipped_steps: steps skipped since the start because a norm was not finite.
        skipped_in_row: of these, those since the last good step, without float16 steps that a
            smaller loss scale may fix.
        loss_scale: factor of the loss (float16); 0 otherwise.
        good_steps: steps since the loss scale last changed.
        top1: of the evaluation after ``step``, if there was one.
        noise: the last estimates of S and |G|² of the gradient noise scale, in turn.
    """

    step: int = 0
    samples: int = 0
    evaluation_due: bool = False
    window_steps: int = 0
    window_losses: tuple[float, ...] = ()
    skipped_steps: int = 0
    skipped_in_row: int = 0
    loss_scale: float = 0.0
    good_steps: int = 0
    top1: float | None = None
    noise: tuple[float, ...] = ()

    @property
    def critical_batch(self) -> float | None:
        """The gradient noise scale S / |G|², in samples: the ratio of averages of few estimates.

        None without any, or if an average is not above 0.
        """
        trace, signal = sum(self.noise[::2]), sum(self.noise[1::2])
        return trace / signal if trace > 0.0 and signal > 0.0 else None

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Parse the JSON of :meth:`record`; raises ValueError if a value is of another type."""
        return TypeAdapter(cls).validate_json(text, strict=True)

    def loss_of(self, rank: int, size: int) -> float:
        """Return a rank's share of the losses since the last log line, for any world size."""
        if len(self.window_losses) == size:
            return self.window_losses[rank]
        return sum(self.window_losses) if rank == 0 else 0.0
