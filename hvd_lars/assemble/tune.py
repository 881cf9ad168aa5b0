"""Run the trials of a study, one after the other, over all ranks."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvd_lars.assemble.plan import make_plan
from hvd_lars.assemble.resuming import Resume
from hvd_lars.assemble.run import build_run
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.binding import changes
from hvd_lars.config.file import dump_config, load_config
from hvd_lars.config.schema import Config
from hvd_lars.config.trials import check_space, trial_config, trial_with, tuned_config
from hvd_lars.errors import DivergedError, UserError
from hvd_lars.health.stop_requests import PRUNED, StopRequests
from hvd_lars.health.watchdog import Watchdog
from hvd_lars.launchers.environment import Launch
from hvd_lars.runtime.files import expand_user, replace_text
from hvd_lars.runtime.terminal import warn
from hvd_lars.state import run_folder
from hvd_lars.train.loop import Loop
from hvd_lars.tuning import TuneSettings
from hvd_lars.tuning.study import Ended, Study, Trial, best_of

BEST, TRIALS = "best.yaml", "trials"


@dataclass(frozen=True)
class Tuned:
    """The end of a job of ``tune``.

    Attributes:
        folder: of the study.
        trials: all that were started.
        best: the best finished trial; None if none finished.
        stopped: reason for ending before the last trial; None otherwise.
    """

    folder: Path
    trials: Sequence[Trial]
    best: Trial | None
    stopped: str | None


def tune(
    config: Config,
    comm: Communicator,
    launch: Launch,
    resume: bool = False,
    note: Callable[[Trial, float], None] = lambda trial, seconds: None,
) -> Tuned:
    """Run the trials of ``config.tune``, and write the best config; collective.

    Every trial that ended is in the folder's journal, and the runs of one that was interrupted
    resume from their checkpoints.

    Args:
        config: ``run.dir`` is the folder of the study.
        comm: the ranks.
        launch: how they were started.
        resume: continue the study in ``run.dir``, or start it there if there is none.
        note: called on rank 0 with each trial that ended, and its seconds.

    Raises:
        UserError: on every rank alike: a trial cannot be run, or the study not be resumed.
    """
    on_root(comm, lambda: check_space(config))
    folder = Path(on_root(comm, lambda: str(_prepare_folder(config, resume))))
    assert config.tune is not None
    job = _Job(config, config.tune, comm, launch, folder)
    with job.stops.listening():
        stopped = None
        while stopped is None:
            started = time.monotonic()
            trial = on_root(comm, job.ask)
            if trial is None:
                break
            ended, stopped = job.run(trial)
            if ended is not None and comm.rank == 0:
                note(ended, time.monotonic() - started)
    return job.result(stopped)


def _prepare_folder(config: Config, resume: bool) -> Path:
    """Create the study's folder, or check that a resumed study is the same; on rank 0."""
    if resume and config.run.dir is None:
        raise UserError("--resume: run.dir is not set; add run.dir=FOLDER of the study")
    if resume:
        stored = expand_user(str(config.run.dir), "run.dir") / run_folder.CONFIG
        if stored.is_file() and stored.stat().st_size:  # empty if the job died at its start
            _check_same_study(config, load_config(str(stored), run_folder.ANYWHERE), stored)
    name = f"{config.run.name}-tune"
    folder = run_folder.create_run_folder(config.run.dir, name, resume, TRIALS)
    (folder / run_folder.STOP).unlink(missing_ok=True)
    replace_text(folder / run_folder.CONFIG, dump_config(config))
    return folder


def _check_same_study(now: Config, then: Config, where: Path) -> None:
    """Raise UserError if a resumed study differs in anything but its number of trials."""
    if then.tune is None:
        raise UserError(f"run.dir: {where.parent} holds a run, not a study")

    def describe(key: str, before: object, after: object) -> str:
        return (
            f"{key}: found {after!r}, the study has {before!r} ({where}); only tune.trials may "
            f"change, or start another study"
        )

    lines = changes(then, now, "run", describe)
    for name in TuneSettings.model_fields:
        before, after = getattr(then.tune, name), getattr(now.tune, name)
        if name != "trials" and before != after:
            lines.append(describe(f"tune.{name}", _plain(before), _plain(after)))
    if lines:
        raise UserError("\n".join(lines))


def _plain(value: object) -> object:
    """Return a range of values as it is written, and other values as they are."""
    if not isinstance(value, dict):
        return value if isinstance(value, int | float | None) else str(value)
    return {key: each.model_dump(exclude_defaults=True) for key, each in value.items()}


@final
class _Job:
    """The study on rank 0, and what all ranks need to run its trials."""

    def __init__(
        self,
        config: Config,
        settings: TuneSettings,
        comm: Communicator,
        launch: Launch,
        folder: Path,
    ) -> None:
        self._config, self._settings, self._folder = config, settings, folder
        self._comm, self._launch = comm, launch
        stop_file = folder / run_folder.STOP if comm.rank == 0 else None
        self.stops = StopRequests.within(config.run.max_hours).with_file(stop_file)
        self._study: Study | None = None
        self._num_train: int | None = None  # once a run has read the data
        on_root(comm, self._open)

    def _open(self) -> None:
        self._study = Study(self._folder, self._settings)

    def ask(self) -> Trial | None:
        """Return the next trial; on rank 0."""
        assert self._study is not None
        trial = self._study.ask()
        while self._study.given_up:
            number = self._study.given_up.pop()
            warn(f"trial {number + 1}: the job ended before its first evaluation, several times")
            self._drop_checkpoints(number)
        return trial

    def run(self, trial: Trial) -> tuple[Trial | None, str | None]:
        """Run a trial's seeds; return how it ended, or None and why it was interrupted."""
        values = list(trial.values)
        for seed in range(len(values), self._settings.seeds):
            try:
                value, stopped = self._run_one(trial, seed)
            except _ImpossibleError:
                return self._end(values, "impossible"), None
            gc.collect()  # ends the run's image loaders
            if stopped == PRUNED:
                return self._end(values, "pruned"), None
            if stopped is not None:
                on_root(self._comm, self._interrupted)
                return None, stopped
            if value is None:
                return self._end(values, "diverged"), None
            values.append(value)
            on_root(self._comm, lambda: self._keep(values, trial.number))
        return self._end(values, "finished"), None

    def _run_one(self, trial: Trial, seed: int) -> tuple[float | None, str | None]:
        """Run one seed; return its metric, None if it diverged, and why it stopped early."""
        folder = self._folder_of(trial.number) / f"seed-{seed}"
        comm, study = self._comm, self._study if seed == 0 else None  # prunes by the first run
        watcher = _Watcher(self._settings.metric, study, self.stops)
        config, loop = self._build(trial, seed, folder, watcher)
        evaluations = -(-loop.intervals.total // loop.intervals.evaluate)
        on_root(comm, lambda: watcher.begin(folder, evaluations))
        run = config.run
        watchdog = Watchdog(comm, loop.position, run.rank_timeout, run.stall_timeout)
        try:
            with watchdog.watching():
                stopped = loop.run().stopped
        except DivergedError:
            return None, None
        finally:
            self.stops.withdraw(PRUNED)
        return comm.broadcast_object(watcher.metric), stopped

    def _build(
        self, trial: Trial, seed: int, folder: Path, watcher: _Watcher
    ) -> tuple[Config, Loop]:
        """Build a run of a trial.

        Raises:
            _ImpossibleError: the trial's values cannot be run, alone or together.
            UserError: it cannot be built for another reason.  A later job goes on with the next
                trial if another's values could be run in this job, and tries this one again if not:
                a folder may be missing for a while.
        """
        comm = self._comm
        try:
            config = trial_config(self._config, trial.params, seed, str(folder))
            if self._num_train is not None:
                make_plan(config, self._num_train, comm.size)
        except UserError as error:
            if comm.rank == 0:
                warn(f"trial {trial.number + 1}: {error}")
            raise _ImpossibleError from None
        try:
            loop, _ = build_run(
                config,
                comm,
                self._launch,
                Resume(None, ()),
                stops=self.stops,
                sinks=(watcher,) if comm.rank == 0 else (),
            )
        except UserError as error:
            if self._num_train is not None and seed == 0:
                self._end((), "impossible")
            name, lines = trial_with(trial.params), str(error).splitlines()
            raise UserError("\n".join(f"{name}: {line}" for line in lines)) from None
        self._num_train = loop.trainer.feed.source.num_train
        return config, loop

    def _folder_of(self, number: int) -> Path:
        return self._folder / TRIALS / f"{number:04d}"

    def _keep(self, values: Sequence[float], number: int) -> None:
        """Note the metrics of finished runs; their checkpoints have no more use; on rank 0."""
        assert self._study is not None
        self._study.run_done(values)
        self._drop_checkpoints(number)

    def _interrupted(self) -> None:
        assert self._study is not None
        self._study.interrupted()

    def _end(self, values: Sequence[float], ended: Ended) -> Trial:
        """Tell the study how the current trial ended, and return it; collective."""

        def tell() -> Trial:
            assert self._study is not None
            trial = self._study.tell(values, ended)
            self._drop_checkpoints(trial.number)
            return trial

        return on_root(self._comm, tell)

    def _drop_checkpoints(self, number: int) -> None:
        for each in self._folder_of(number).glob(f"*/{run_folder.CHECKPOINTS}"):
            shutil.rmtree(each, ignore_errors=True)

    def result(self, stopped: str | None) -> Tuned:
        """Write the best config on rank 0, and return the end; collective."""

        def write() -> tuple[list[Trial], Trial | None]:
            assert self._study is not None
            trials = self._study.trials()
            best = best_of(trials, self._settings.maximize)
            if best is not None:
                found = tuned_config(self._config, best.params)
                replace_text(self._folder / BEST, dump_config(found))
            return trials, best

        trials, best = on_root(self._comm, write)
        return Tuned(self._folder, trials, best, stopped)


class _ImpossibleError(Exception):
    """A trial's values cannot be run."""


@final
class _Watcher:
    """Takes a run's evaluations on rank 0, and asks to stop a run that the study prunes.

    Args:
        metric: its name in the records.
        study: takes the curve; None for a run that is not pruned.
        stops: of the job.
    """

    def __init__(self, metric: str, study: Study | None, stops: StopRequests) -> None:
        self._name, self._study, self._stops = metric, study, stops
        self._evaluations, self._last = 0, 1
        self.metric: float | None = None  # of the last evaluation; None if it is not finite

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of an evaluation."""
        if record["kind"] != "eval":
            return
        self._evaluations += 1
        value = record[self._name]
        self.metric = value if value is not None and math.isfinite(value) else None
        if self._study is None or self.metric is None:
            return
        if self._study.report(self._evaluations, self._last, self.metric):
            self._stops.ask(PRUNED)

    def close(self) -> None:
        """Do nothing."""

    def begin(self, folder: Path, evaluations: int) -> None:
        """Note a run's number of evaluations, and take those that it recorded before."""
        self._last = evaluations
        for line in (folder / run_folder.METRICS).read_bytes().splitlines():
            self.write(json.loads(line))
