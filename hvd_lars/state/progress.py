"""Where a run stands, beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Progress:
    """All that a resumed run needs to go on with the same bits, but for tensors.

    Attributes:
        step: optimizer steps that are done.
        samples: that they took; not the product with the global batch where that was changed.
        evaluation_due: the evaluation after them was interrupted.
        window_steps: steps since the last log line.
        window_losses: by rank, its share of their losses, as last gathered.
        skipped_steps: steps that were left out since the start, as a norm was not finite.
        skipped_in_row: those since the last good one; without those of float16 that a smaller
            scale of the loss may mend.
        loss_scale: factor of the loss (float16); 0 elsewhere.
        good_steps: steps since it last changed.
        top1: of the evaluation after ``step``, where there was one.
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

    def record(self) -> dict[str, Any]:
        """As plain values for JSON, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """What :meth:`record` gave, as JSON; ValueError where a value is of another type."""
        return TypeAdapter(cls).validate_json(text, strict=True)

    def loss_of(self, rank: int, size: int) -> float:
        """A rank's share of the losses since the last log line, also of another world size."""
        if len(self.window_losses) == size:
            return self.window_losses[rank]
        return sum(self.window_losses) if rank == 0 else 0.0
