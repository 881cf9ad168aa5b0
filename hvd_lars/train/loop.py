"""The training loop, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hvd_lars.data.source import Batch, Request
from hvd_lars.errors import DivergedError, UserError
from hvd_lars.health.agreement import Agreement, Decision
from hvd_lars.health.heartbeats import Position
from hvd_lars.metrics import Sink
from hvd_lars.settings.durations import Intervals
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.replicas import verify_agreement
from hvd_lars.train.evaluation import Evaluation, Evaluator
from hvd_lars.train.noise_scale import Noise
from hvd_lars.train.profiling import Profile
from hvd_lars.train.recorder import Recorder
from hvd_lars.train.trainer import Outcome, Trainer


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        evaluation: the last one.
        images_per_second: of training alone, in this process.
        seconds: of the whole run, in this process.
        stopped: the reason for ending before the last step; None otherwise.
        checkpoint: the last one.
    """

    evaluation: Evaluation | None
    images_per_second: float
    seconds: float
    stopped: str | None = None
    checkpoint: Path | None = None


class Loop:
    """One rank's part of a run: steps, log lines, evaluations, checkpoints; ``run`` is collective.

    Args:
        trainer: takes the steps.
        intervals: length of the run, and how often to do everything else.
        evaluator: measures the model.
        checkpointer: saves the state; None saves nothing.
        sinks: receive the records; empty except on rank 0.
        agreement: of the ranks, on stopping among other things.
        take_snapshot: copies the state to host memory, in an elastic job.
        profile: of some steps.
    """

    def __init__(
        self,
        trainer: Trainer,
        intervals: Intervals,
        evaluator: Evaluator,
        checkpointer: Checkpointer | None = None,
        sinks: Sequence[Sink] = (),
        agreement: Agreement | None = None,
        take_snapshot: Callable[[], None] | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.trainer, self.state, self.intervals = trainer, trainer.state, intervals
        self.evaluator, self.checkpointer, self.profile = evaluator, checkpointer, profile
        self.recorder = Recorder(trainer, sinks, intervals.layers)
        self.agreement = agreement or Agreement(trainer.comm)
        self._take_snapshot = take_snapshot
        self._doing, self._evaluated = "", 0  # if not training; evaluation batches
        self._noise: Noise | None = None  # of the last step read

    def position(self) -> Position:
        """Return this rank's position, for the watchdog's thread."""
        watch = self.trainer.watch
        ticks = watch.changes + self._evaluated
        return Position(self.state.progress.step, self._doing or watch.current, ticks)

    def run(self) -> Summary:
        """Train from ``state.progress`` to the end; sinks are closed in any case.

        All ranks must hold the same bits when it is called.

        Raises:
            ReplicasDifferError: a comparison finds that ranks do not hold the same bits.
            UserError: the last checkpoint cannot be written.
            DivergedError: too many steps in a row were skipped because a gradient was not finite.
        """
        try:
            return self._run()
        except Exception:
            if self.checkpointer is not None:
                self.checkpointer.finish()  # an elastic job's next attempt may write there
            raise
        finally:
            for sink in self.recorder.sinks:
                sink.close()

    def _run(self) -> Summary:
        state, total = self.state, self.intervals.total
        state.model.train()
        self._snapshot()
        self.recorder.begin()
        started = time.perf_counter()
        aside, trained = 0.0, 0  # seconds of evaluation and checkpoints, steps
        evaluation: Evaluation | None = None
        stopped: str | None = None
        checkpoint: Path | None = None
        batches = self.trainer.feed.from_step(state.progress.step)
        if state.progress.evaluation_due:
            evaluation, stopped = self._evaluate()
        while stopped is None and state.progress.step < total:
            decision = self._train_and_log(batches)
            trained += 1
            pause = time.perf_counter()
            step = state.progress.step
            last = step == total
            stopped = None if last else decision.stop
            if last or step % self.intervals.evaluate == 0:
                state.evaluation_due()
                if stopped is None:
                    evaluation, stopped = self._evaluate()
            if stopped or last or decision.checkpoint or step % self.intervals.checkpoint == 0:
                checkpoint = self._save(background=not (stopped or last))
            if not (stopped or last) and step % self.intervals.snapshot == 0:
                self._snapshot()
            pause = time.perf_counter() - pause
            aside += pause
            self.recorder.pause(pause)
        if stopped and checkpoint is None:
            checkpoint = self._save(background=False)
        if self.profile is not None:
            self.profile.finish()
        seconds = time.perf_counter() - started
        rate = trained * self.trainer.global_batch / max(seconds - aside, 1e-9)
        reason = stopped or "finished"
        self.recorder.record("event", state.progress.step, event="stop", reason=reason)
        return Summary(evaluation, rate, seconds, stopped, checkpoint)

    def _train_and_log(self, batches: Iterator[tuple[Request, Batch]]) -> Decision:
        """Train and log a step, and return the ranks' decision after it."""
        state = self.state
        if self.profile is not None:
            self.profile.before(state.progress.step + 1)
        self.trainer.placement.scalars.add(self.agreement.requests())
        loss = self.trainer.train_step(batches)
        step = state.progress.step
        self.recorder.add_loss(loss)
        decision = self._settle(wait=self._pauses_at(step))
        self.recorder.step_taken(step, self._noise)
        if self.intervals.verify and step % self.intervals.verify == 0:
            self.trainer.placement.complete_parameters()
            verify_agreement(dict(state.model.named_parameters()), self.trainer.comm)
        if step % self.intervals.log == 0 or step == self.intervals.total:
            self.recorder.log_window()
        return decision

    def _pauses_at(self, step: int) -> bool:
        """Return whether an action after ``step`` needs the outcomes of all steps so far."""
        if self._take_snapshot is not None and step % self.intervals.snapshot == 0:
            return True
        return self.intervals.pauses_at(step)

    def _settle(self, wait: bool) -> Decision:
        """Handle the outcomes of steps that have arrived, or of all steps if ``wait``.

        A decision to stop or save waits for the others, too, so that the state is complete.
        """
        decision = Decision(None, False)
        for outcome in self.trainer.outcomes(wait):
            decision = decision.joined(self._handle(outcome))
        if decision.stop or decision.checkpoint:
            for outcome in self.trainer.outcomes(wait=True):
                decision = decision.joined(self._handle(outcome))
        return decision

    def _handle(self, outcome: Outcome) -> Decision:
        """Record a skipped step, and return the ranks' decision after a step."""
        self._noise = outcome.noise
        if outcome.skipped:
            progress = self.state.progress
            in_row = progress.skipped_in_row
            self.recorder.record("event", outcome.step, event="skipped", in_row=in_row)
            none = outcome.step == progress.skipped_steps == self.intervals.total
            if none or in_row > self.trainer.options.max_skipped_steps:
                problem = self._diverged(outcome)
                checkpoint = self._save(background=False)
                raise DivergedError(f"{problem}; the last good weights are in {checkpoint}")
        return self._decide(outcome.scalars)

    def _decide(self, summed: Tensor | None = None) -> Decision:
        """Return the ranks' decision, after recording unreadable images."""
        try:
            decision = self.agreement.decide(summed)
        except UserError:  # too many unreadable images: save the training so far
            self._save(background=False)
            raise
        for line, evaluation in decision.unreadable:
            event = "not_evaluated" if evaluation else "replaced"
            self.recorder.record("event", self.state.progress.step, event=event, image=line)
        return decision

    def _diverged(self, outcome: Outcome) -> str:
        bad = outcome.report.first_nonfinite()
        names = [name for name, param in self.state.model.named_parameters() if param is bad]
        progress = self.state.progress
        count = f"{progress.skipped_in_row} steps in a row, up to step {outcome.step},"
        if progress.skipped_steps == outcome.step:
            count = f"all {outcome.step} steps"
        return (
            f"train.max_skipped_steps: {count} had gradients that are not finite, first in "
            f"{', '.join(names)}; allowed: {self.trainer.options.max_skipped_steps} in a row"
        )

    def _evaluate(self) -> tuple[Evaluation | None, str | None]:
        """Evaluate the model and its average, if any; returns a reason to stop, too."""
        self.trainer.placement.complete_parameters()
        reasons: list[str] = []

        def stopped() -> bool:
            self._doing, self._evaluated = "evaluation", self._evaluated + 1
            reasons.extend(filter(None, [self._decide().stop]))
            return bool(reasons)

        result = self.evaluator.evaluate(self.state.model, stopped)
        average = None
        if result is not None and self.state.average is not None:
            average = self.evaluator.evaluate(self.state.average.module, stopped)
        self._doing = ""
        if result is None or (self.state.average is not None and average is None):
            return None, reasons[0]
        self.state.evaluated(result.top1)
        fields = result.record() | ({} if average is None else average.record("ema_"))
        self.recorder.record("eval", self.state.progress.step, **fields)
        return result, reasons[0] if reasons else None

    def _save(self, background: bool) -> Path | None:
        """Save a checkpoint; collective."""
        if self.checkpointer is None:
            return None
        self._complete_state()
        self._doing = "checkpoint"
        path, stall = self.checkpointer.save(self.state, background)
        self._doing = ""
        self.agreement.checkpoint_made()
        step = self.state.progress.step
        self.recorder.record("event", step, event="checkpoint", path=path.name, stall_seconds=stall)
        return path

    def _snapshot(self) -> None:
        if self._take_snapshot is not None:
            self._complete_state()
            self._take_snapshot()

    def _complete_state(self) -> None:
        """Gather the state that a resume needs; collective."""
        for _ in self.trainer.outcomes(wait=True):  # some are left only if the run is failing
            pass
        self.trainer.placement.complete_parameters()
        self.state.note_losses(self.recorder.losses())
