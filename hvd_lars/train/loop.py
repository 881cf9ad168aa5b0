"""The training loop, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hvd_lars.data import Request
from hvd_lars.data.source import Batch
from hvd_lars.errors import UserError
from hvd_lars.health.agreement import Outcome, Votes
from hvd_lars.health.heartbeats import Place
from hvd_lars.metrics import Sink
from hvd_lars.settings.durations import Intervals
from hvd_lars.state.checkpoint import Checkpointer
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import broadcast_and_verify, named_state, verify_agreement
from hvd_lars.train.evaluation import Evaluation, evaluate
from hvd_lars.train.profiling import Profile
from hvd_lars.train.recorder import Recorder
from hvd_lars.train.trainer import Trainer


@dataclass(frozen=True)
class Summary:
    """What a run came to; images per second over training alone, in this process.

    ``stopped`` says who ended it before its last step, ``evaluation`` is then the last there was.
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
        intervals: how long, and how often the rest is done.
        eval_batch: most samples in one evaluation pass.
        checkpointer: keeps the state; nothing is kept without one.
        sinks: take the records; empty but on rank 0.
        layers_every: steps between records of all layers' norms; 0 for none.
        max_skipped_steps: steps in a row that may be left out because a norm is not finite.
        verify_every: steps between comparisons of the ranks' parameters; 0 for none.
        votes: what ranks tell each other besides; requests to stop before the end among it.
        commit: copies the state to host memory, in a job whose ranks come and go; it is called
            at the start, and then every
        commit_every: steps.
        profile: of some steps.
    """

    def __init__(
        self,
        trainer: Trainer,
        intervals: Intervals,
        eval_batch: int,
        checkpointer: Checkpointer | None = None,
        sinks: Sequence[Sink] = (),
        max_skipped_steps: int = 10,
        verify_every: int = 0,
        votes: Votes | None = None,
        commit: Callable[[], None] | None = None,
        commit_every: int = 20,
        layers_every: int = 0,
        profile: Profile | None = None,
    ) -> None:
        self.trainer, self.intervals, self.eval_batch = trainer, intervals, eval_batch
        self.checkpointer = checkpointer
        self.recorder = Recorder(trainer, sinks, layers_every)
        self.max_skipped_steps, self.verify_every = max_skipped_steps, verify_every
        self.profile, self.commit, self.commit_every = profile, commit, commit_every
        self._comm = trainer.comm
        self.votes = votes or Votes(self._comm)
        self._doing, self._evaluated = "", 0  # what but training goes on; batches of evaluation

    def place(self) -> Place:
        """Where this rank is, for a watchdog's thread."""
        watch = self.trainer.watch
        ticks = watch.changes + self._evaluated
        return Place(self.trainer.progress.step, self._doing or watch.current, ticks)

    def resume(self, progress: Progress) -> None:
        """Go on from a checkpoint, whose tensors are restored already."""
        self.trainer.resume(progress)
        self.recorder.resume(progress)

    def run(self) -> Summary:
        """Train from where ``progress`` stands to the end; whatever happens, nothing is left open.

        Raises: what :meth:`_run` does.
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
        """Train from where ``progress`` stands to the end, or until the ranks agree to stop.

        Raises:
            ReplicasDifferError: ranks do not hold the same bits, at the start or when compared.
            UserError: the last checkpoint cannot be written, or too many steps in a row were
                left out because a gradient was not finite.
        """
        state = named_state(self.trainer.model, self.trainer.optimizer, self.trainer.average)
        broadcast_and_verify(state, self._comm)
        progress, total = self.trainer.progress, self.intervals.total
        self.trainer.model.train()
        self._commit()
        self.recorder.begin()
        started = time.perf_counter()
        aside, trained = 0.0, 0  # seconds of evaluation and checkpoints, steps
        evaluation: Evaluation | None = None
        stopped: str | None = None
        kept: Path | None = None
        batches = self.trainer.batches_from(progress.step)
        if progress.evaluation_due:
            evaluation, stopped = self._evaluate()
        while stopped is None and progress.step < total:
            self._train_and_log(batches)
            trained += 1
            pause = time.perf_counter()
            last = progress.step == total
            agreed = self._agree(self.trainer.placement.gradients.scalars.take())
            stopped = None if last else agreed.stop
            if last or progress.step % self.intervals.evaluate == 0:
                progress.evaluation_due = True
                if stopped is None:
                    evaluation, stopped = self._evaluate()
            due = agreed.keep or progress.step % self.intervals.checkpoint == 0
            if stopped or last or due:
                kept = self._keep(beside=not (stopped or last))
            if not (stopped or last) and progress.step % self.commit_every == 0:
                self._commit()
            pause = time.perf_counter() - pause
            aside += pause
            self.recorder.pause(pause)
        if stopped and kept is None:
            kept = self._keep(beside=False)
        if self.profile is not None:
            self.profile.finish()
        seconds = time.perf_counter() - started
        rate = trained * self.trainer.batches.global_batch / max(seconds - aside, 1e-9)
        self.recorder.record("event", progress.step, event="stop", reason=stopped or "finished")
        return Summary(evaluation, rate, seconds, stopped, kept)

    def _agree(self, counted: Tensor | None = None) -> Outcome:
        """What the ranks agreed on, after noting images that cannot be read."""
        try:
            outcome = self.votes.count(counted)
        except UserError:  # too much of the data cannot be read: keep what was trained
            self._keep(beside=False)
            raise
        for line, evaluation in outcome.unreadable:
            event = "not_evaluated" if evaluation else "replaced"
            self.recorder.record("event", self.trainer.progress.step, event=event, image=line)
        return outcome

    def _train_and_log(self, batches: Iterator[tuple[Request, Batch]]) -> None:
        progress = self.trainer.progress
        if self.profile is not None:
            self.profile.before(progress.step + 1)
        self.trainer.placement.gradients.scalars.add(self.votes.cast())
        loss = self.trainer.train_step(progress.step, batches)
        progress.step += 1
        progress.samples += self.trainer.batches.global_batch
        progress.top1 = None
        if self.trainer.optimizer.skipped:
            self.recorder.record(
                "event", progress.step, event="skipped", in_row=progress.skipped_in_row
            )
            none = progress.step == progress.skipped_steps == self.intervals.total
            if none or progress.skipped_in_row > self.max_skipped_steps:
                raise UserError(self._diverged(self._keep(beside=False)))
        self.recorder.step_taken(None if self.trainer.optimizer.skipped else loss)
        if self.verify_every and progress.step % self.verify_every == 0:
            self.trainer.placement.complete_parameters()
            verify_agreement(dict(self.trainer.model.named_parameters()), self._comm)
        if progress.step % self.intervals.log == 0 or progress.step == self.intervals.total:
            self.recorder.log_window()

    def _diverged(self, kept: Path | None) -> str:
        bad = self.trainer.optimizer.first_not_finite()
        names = [name for name, param in self.trainer.model.named_parameters() if param is bad]
        progress = self.trainer.progress
        count = f"{progress.skipped_in_row} steps in a row, up to step {progress.step},"
        if progress.skipped_steps == progress.step:
            count = f"all {progress.step} steps"
        return (
            f"train.max_skipped_steps: {count} had gradients that are not finite, first in "
            f"{', '.join(names)}; allowed: {self.max_skipped_steps} in a row; the weights from "
            f"before them are in {kept}"
        )

    def _evaluate(self) -> tuple[Evaluation | None, str | None]:
        """Evaluate the model, and its average where there is one; who asked to stop meanwhile."""
        self.trainer.placement.complete_parameters()
        stopped: list[str] = []

        def asked() -> bool:
            self._doing, self._evaluated = "evaluation", self._evaluated + 1
            stopped.extend(filter(None, [self._agree().stop]))
            return bool(stopped)

        trainer = self.trainer
        options = trainer.source, self._comm, self.eval_batch, trainer.device, trainer.workers
        result = evaluate(trainer.model, *options, stopped=asked)
        average = None
        if result is not None and trainer.average is not None:
            average = evaluate(trainer.average.module, *options, stopped=asked)
        self._doing = ""
        if result is None or (trainer.average is not None and average is None):
            return None, stopped[0]
        self.trainer.progress.evaluation_due = False
        fields = result.record() | ({} if average is None else average.record("ema_"))
        self.trainer.progress.top1 = result.top1
        self.recorder.record("eval", self.trainer.progress.step, **fields)
        return result, stopped[0] if stopped else None

    def _keep(self, beside: bool) -> Path | None:
        """Save everything; collective."""
        if self.checkpointer is None:
            return None
        self._gather_progress()
        progress = self.trainer.progress
        self._doing = "checkpoint"
        path, stall = self.checkpointer.save(
            self.trainer.model, self.trainer.optimizer, progress, self.trainer.average, beside
        )
        self._doing = ""
        self.votes.kept()
        self.recorder.record(
            "event", progress.step, event="checkpoint", path=path.name, stall_seconds=stall
        )
        return path

    def _commit(self) -> None:
        if self.commit is not None:
            self._gather_progress()
            self.commit()

    def _gather_progress(self) -> None:
        """Complete what a resumed run needs; collective."""
        self.trainer.placement.complete_parameters()
        progress = self.trainer.progress
        progress.window_losses = self.recorder.losses()
        if self.trainer.loss_scale is not None:
            progress.loss_scale = self.trainer.loss_scale.value
            progress.good_steps = self.trainer.loss_scale.good_steps
