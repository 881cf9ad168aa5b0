"""The state of a run: everything that training carries from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.optim.protocol import Optimizer
from hvd_lars.runtime.joined import is_expanded
from hvd_lars.state.progress import Progress

# Few, since both fall by orders of magnitude during training: older ones would outweigh the rest.
_NOISE_ESTIMATES = 10


@final
class RunState:
    """Model, optimizer, moving average and progress; only its methods change ``progress``.

    Args:
        model: the network to train or evaluate.
        optimizer: of its parameters; None for an evaluation.
        average: moving average of the model.
        progress: the run's position.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        average: MovingAverage | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self._progress = progress or Progress()

    @property
    def progress(self) -> Progress:
        """The run's position."""
        return self._progress

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, the optimizer's first; collective for sharded slots.

        ``SLOT/NAME`` are whole slots of the optimizer (``momentum/conv.weight``), ``model/NAME``
        parameters and buffers of the model, ``average/NAME`` those of its moving average.  All
        are live tensors, except for sharded slots, which are gathered, and for buffers of which
        several elements share memory: constants, which are copied.
        """
        state: dict[str, Tensor] = {}
        optimizer = self.optimizer
        for slot in () if optimizer is None else optimizer.slots:
            assert optimizer is not None
            for name, param in self.model.named_parameters():
                if (value := optimizer.slot(slot, param)) is not None:
                    state[f"{slot}/{name}"] = value
        models = {"model": self.model} | ({} if self.average is None else {"average": self.average})
        for kind, model in models.items():
            for name, value in model.state_dict().items():
                if value is not None:  # of a module's get_extra_state
                    state[f"{kind}/{name}"] = value.contiguous() if is_expanded(value) else value
        return state

    def restored(self, progress: Progress) -> None:
        """Set the progress to that of the restored tensors."""
        self._progress = progress

    def step_taken(self, samples: int) -> None:
        """Count an optimizer step of ``samples``, kept or skipped."""
        was = self._progress
        # An old checkpoint did not count samples.
        before = was.samples or was.step * samples
        self._change(
            step=was.step + 1,
            samples=before + samples,
            top1=None,
            window_steps=was.window_steps + 1,
        )

    def step_settled(self, skipped: bool, excused: bool = False, **loss_scale: Any) -> None:
        """Note whether a step was skipped; once for every :meth:`step_taken`, in order.

        Args:
            skipped: whether it was skipped.
            excused: whether it does not count among the skipped steps in a row.
            loss_scale: ``loss_scale`` and ``good_steps`` for the next step.
        """
        was = self._progress
        self._change(
            window_steps=was.window_steps - skipped,
            skipped_steps=was.skipped_steps + skipped,
            skipped_in_row=was.skipped_in_row + (not excused) if skipped else 0,
            **loss_scale,
        )

    def noise_estimated(self, trace: float, signal: float) -> None:
        """Keep the last estimates of S and |G|²."""
        kept = (*self._progress.noise, trace, signal)
        self._change(noise=kept[-2 * _NOISE_ESTIMATES :])

    def evaluation_due(self) -> None:
        """Note that an evaluation of this step is due or has begun."""
        self._change(evaluation_due=True)

    def evaluated(self, top1: float) -> None:
        """Note that the evaluation of this step is complete."""
        self._change(evaluation_due=False, top1=top1)

    def window_logged(self) -> None:
        """Begin a log window."""
        self._change(window_steps=0)

    def note_losses(self, losses: Sequence[float]) -> None:
        """Keep each rank's sum of loss shares in this log window."""
        self._change(window_losses=tuple(losses))

    def _change(self, **values: Any) -> None:
        self._progress = replace(self._progress, **values)
