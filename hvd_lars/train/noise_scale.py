"""The gradient noise scale: how large a batch is worth it.

Source:
    McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.optim import Placement
from hvd_lars.optim.device_step import StepReport
from hvd_lars.runtime.readback import send


class Noise(NamedTuple):
    """Unbiased estimates of one step, which may be negative.

    Attributes:
        trace: S, the trace of the covariance of a sample's gradient.
        signal: |G|², the squared norm of the true gradient.
        traces: S by parameter.
        signals: |G|² by parameter.
    """

    trace: float
    signal: float
    traces: dict[Tensor, float]
    signals: dict[Tensor, float]


@final
class NoiseProbe:
    """Compares a rank's own gradient, of b samples, with that of the global batch of B.

    With G_b and G_B both means over their samples, S = (|G_b|² − |G_B|²) / (1/b − 1/B) and
    |G|² = |G_B|² − S / B; |G_b|² and 1/b are averaged over the ranks first.  On one rank G_b is the
    first micro-batch's, and a step of one micro-batch has no estimate.  Augmentation that mixes
    samples makes them dependent, which biases the estimates.

    Args:
        placement: sums the gradients.
        comm: the ranks.
        global_batch: B.
        every: steps between estimates; 0 for none.
    """

    def __init__(
        self, placement: Placement, comm: Communicator, global_batch: int, every: int
    ) -> None:
        self._gradients, self._comm = placement.gradients, comm
        self._global_batch, self._every = global_batch, every
        self.measuring = False  # whether the step that has begun is
        self._samples = 0  # of G_b
        self._params = [param for bucket in self._gradients.buckets for param in bucket.params]

    @property
    def num_values(self) -> int:
        """Numbers that :meth:`values` returns."""
        return len(self._params) + 2

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1."""
        self.measuring = bool(self._every) and step % self._every == 0
        self._samples = 0
        if self.measuring:
            self._gradients.local.ask()

    def micro_batch_done(self, samples: int, last: bool) -> None:
        """Note a backward pass over ``samples``."""
        if self._comm.size > 1:
            self._samples += samples
        elif self.measuring and not self._samples and not last:
            self._gradients.note_local()
            self._samples = samples

    def values(self, scale: Tensor | None) -> Tensor | None:
        """Return this rank's numbers, (num_values,) float64, to be summed over the ranks.

        None if this step is not measured.

        Args:
            scale: factor of the loss, 0-dim; None for 1.
        """
        if not self.measuring:
            return None
        self.measuring = False
        sums, samples = self._gradients.local.take(), self._samples
        if not samples:  # no part of the batch, or no smaller one to compare it with
            return torch.zeros(self.num_values, dtype=torch.float64, device=sums.device)
        means = sums * (self._global_batch / samples) ** 2
        if scale is not None:
            means = means / scale.square()
        facts = torch.tensor([1.0 / samples, 1.0], dtype=torch.float64)
        return torch.cat([means, send(facts, sums.device)])

    def estimate(self, summed: list[float], report: StepReport) -> Noise | None:
        """Return the estimates of a step from its values summed over the ranks.

        None where there is none: one rank with one micro-batch, a step that was skipped, norms that
        include weight decay (``denominator="combined"``), or a parameter that was frozen after its
        placement was made.
        """
        *squares, inverse, count = summed
        norms = {row.param: row for row in report.norms()}
        combined = any(group.get("denominator") == "combined" for group in report.groups())
        if not count or report.skipped or combined or not norms.keys() >= set(self._params):
            return None
        spread = inverse / count - 1.0 / self._global_batch
        if spread <= 0.0:
            return None
        traces: dict[Tensor, float] = {}
        signals: dict[Tensor, float] = {}
        for param, local in zip(self._params, squares, strict=True):
            whole = norms[param].gradient ** 2
            traces[param] = (local / count - whole) / spread
            signals[param] = whole - traces[param] / self._global_batch
        return Noise(sum(traces.values()), sum(signals.values()), traces, signals)
