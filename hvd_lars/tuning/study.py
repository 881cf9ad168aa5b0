"""A study: Optuna proposes trials and prunes them; its journal on disk is the whole state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, final

from hvd_lars.errors import UserError
from hvd_lars.tuning.settings import Range, TuneSettings

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
_VALUES, _ENDED, _STARTS = "values", "ended", "starts"  # attributes of Optuna's trials
_SPREAD_TRIALS = 10  # before the estimator: of fewer, it proposes the ends of a range
_FEWEST_FOR_MEDIAN = 2  # earlier trials
_MOST_STARTS = 3  # of a trial whose job ends before its first evaluation
Ended = Literal["finished", "pruned", "diverged", "impossible", "running"]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: in order of the proposals, from 0.
        params: values by key.
        values: the metric of each finished run, one a seed.
        ended: how it ended; impossible if its values cannot be run.
        value: the mean of ``values``; None unless it finished.
        curve: the first run's metric by evaluation, counted from 1.
    """

    number: int
    params: Mapping[str, Any]
    values: Sequence[float]
    ended: Ended
    value: float | None = None
    curve: Mapping[int, float] | None = None


@final
class Study:
    """The trials of one folder, for one process at a time.

    A proposal depends on the seed and the trials before it only, so a study that was killed goes
    on as it would have.

    Args:
        folder: holds the journal, which is created if it is missing.
        settings: the search.

    Raises:
        UserError: Optuna is missing, or the journal is not one.
    """

    def __init__(self, folder: Path, settings: TuneSettings) -> None:
        _require_optuna()
        self._settings = settings
        self._sign = 1.0 if settings.maximize else -1.0  # makes a greater metric the better one
        journal = folder / JOURNAL
        _cut_torn_line(journal)
        journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)  # of a killed job
        self._study = _open(
            journal,
            direction="maximize" if settings.maximize else "minimize",
        )
        if settings.sampler == "grid":
            for params in settings.grid()[len(self._study.get_trials(deepcopy=False)) :]:
                self._study.enqueue_trial(params)
        self._current: optuna.trial.Trial | None = None
        self.given_up: list[int] = []  # trials that ask() ended, for the caller to clear

    def ask(self) -> Trial | None:
        """Return the next trial to run, or None if none is left.

        It is first one that a killed job left half done, with the metrics of its finished runs; but
        not a fourth time if the job always ended before the first evaluation.
        """
        from optuna.trial import Trial as Optunas
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        unfinished = next((each for each in trials if each.state == TrialState.RUNNING), None)
        if unfinished is not None:
            # Optuna has no other way to go on with a trial of another process.
            trial = Optunas(self._study, unfinished._trial_id)
        else:
            waiting = any(each.state == TrialState.WAITING for each in trials)
            enough = self._settings.sampler == "grid" or len(trials) >= self._settings.trials
            if not waiting and enough:
                return None
            trial = self._study.ask()
        params = {}
        for place, (name, each) in enumerate(self._settings.space.items()):
            self._study.sampler = self._sampler(trial.number, place)
            params[name] = _suggest(trial, name, each)
        self._current = trial
        starts = trial.user_attrs.get(_STARTS, 0) + 1
        trial.set_user_attr(_STARTS, starts)
        values = trial.user_attrs.get(_VALUES, [])
        if starts > _MOST_STARTS and not values and not self._curve():
            self.tell([], "impossible")  # such as for want of memory, which ends the job
            self.given_up.append(trial.number)
            return self.ask()
        return Trial(trial.number, params, values, "running")

    def interrupted(self) -> None:
        """Note that the job was asked to stop: the current trial's start does not count."""
        assert self._current is not None
        starts = self._study.get_trials(deepcopy=False)[self._current_number()].user_attrs[_STARTS]
        self._current.set_user_attr(_STARTS, starts - 1)

    def _curve(self) -> dict[int, float]:
        """Return what the current trial has reported, by evaluation."""
        curve: dict[int, float] = self._study.get_trials(deepcopy=False)[
            self._current_number()
        ].intermediate_values
        return curve

    def _sampler(self, trial: int, place: int) -> optuna.samplers.BaseSampler:
        """Return a sampler for a trial's value of one key, seeded by both."""
        from optuna import samplers

        from hvd_lars.tuning.proposals import Spread, spread

        keys, seed = len(self._settings.space), self._settings.sampler_seed
        own_seed = (seed * 100_003 + keys * trial + place) % 2**32
        if self._settings.sampler != "tpe":
            return samplers.RandomSampler(own_seed)
        if trial < _SPREAD_TRIALS:
            return Spread(spread(trial, place, keys, seed))
        return samplers.TPESampler(n_startup_trials=0, seed=own_seed)

    def report(self, evaluation: int, last: int, value: float) -> bool:
        """Take the first run's metric at an evaluation; return whether to prune the trial.

        Args:
            evaluation: counted from 1.
            last: the run's number of evaluations.
            value: the metric.
        """
        assert self._current is not None
        if evaluation not in self._curve():  # a killed job may have reported it
            self._current.report(value, evaluation)
        if self._settings.pruning == "none" or evaluation == last:
            return False
        if self._settings.pruning == "median":
            rung = self._settings.first or max(1, last // 2)
            return rung == evaluation and self._is_below_median(rung, value)
        reduction, rung = self._settings.reduction, self._settings.first or max(1, last // 4)
        while rung < evaluation:
            rung *= reduction
        return rung == evaluation and not self._is_promoted(rung, value, reduction)

    def _is_below_median(self, rung: int, value: float) -> bool:
        """Return whether a value is worse than the median of the earlier trials at a rung."""
        others = self._reached(rung)
        return len(others) >= _FEWEST_FOR_MEDIAN and self._sign * value < median(others)

    def _is_promoted(self, rung: int, value: float, reduction: int) -> bool:
        """Return whether a value is among the best of those that reached a rung so far.

        This is the rule of Optuna's SuccessiveHalvingPruner, from the curves alone: the marks that
        Optuna sets in its journal would let a trial pass that was killed just after its decision.
        """
        value *= self._sign
        reached = sorted([*self._reached(rung), value], reverse=True)
        return value >= reached[max(len(reached) // reduction, 1) - 1]

    def _reached(self, rung: int) -> list[float]:
        """Return the metrics at a rung of the trials before this one; greater ones are better."""
        return [
            self._sign * each.intermediate_values[rung]
            for each in self._study.get_trials(deepcopy=False)[: self._current_number()]
            if rung in each.intermediate_values
        ]

    def _current_number(self) -> int:
        assert self._current is not None
        return self._current.number

    def run_done(self, values: Sequence[float]) -> None:
        """Keep the metrics of the runs that the current trial has finished."""
        assert self._current is not None
        self._current.set_user_attr(_VALUES, list(values))

    def tell(self, values: Sequence[float], ended: Ended) -> Trial:
        """End the current trial and return it; without a metric it has the worst value there is."""
        assert self._current is not None
        from optuna.trial import TrialState

        trial = self._current
        trial.set_user_attr(_VALUES, list(values))
        trial.set_user_attr(_ENDED, ended)
        if ended == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            worst = 0.0 if self._settings.maximize else math.inf
            value = sum(values) / len(values) if ended == "finished" else worst
            self._study.tell(trial, value)
        self._current = None
        return self.trials()[trial.number]

    def trials(self) -> list[Trial]:
        """Return all trials that were started, in order of their numbers."""
        return _trials_of(self._study)


def best_of(trials: Sequence[Trial], maximize: bool) -> Trial | None:
    """Return the finished trial with the best value; the earliest of several."""
    finished = [each for each in trials if each.ended == "finished" and each.value is not None]
    sign = -1.0 if maximize else 1.0
    return min(finished, key=lambda each: sign * (each.value or 0.0), default=None)


def shown(value: object) -> str:
    """Return a trial's value with at most four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_study(folder: Path) -> bool:
    """Return whether a folder holds a study."""
    return (folder / JOURNAL).is_file()


def read_trials(folder: Path) -> list[Trial]:
    """Return the trials of a study's folder, also while it runs.

    Raises:
        UserError: Optuna is missing, or the journal is not one.
    """
    _require_optuna()
    return _trials_of(_open(folder / JOURNAL))


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise UserError("tune: needs Optuna: pip install 'hvd_lars[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open(journal: Path, **options: Any) -> optuna.Study:
    """Return Optuna's study in a journal; with ``options``, create it if it is missing."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    name = str(journal)
    try:
        backend = JournalFileBackend(name, lock_obj=JournalFileOpenLock(name))
        storage = optuna.storages.JournalStorage(backend)
        if not options:
            return optuna.load_study(study_name="tune", storage=storage)
        return optuna.create_study(
            study_name="tune", storage=storage, load_if_exists=True, **options
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{journal}: not a study's journal: {reason}") from None


def _cut_torn_line(journal: Path) -> None:
    """Cut off a last line that a killed job wrote in part: more would be appended to it."""
    if journal.is_file() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _suggest(trial: optuna.Trial, name: str, each: Range) -> Any:
    """Return a key's value in a trial; propose it if the trial has none yet."""
    if each.choices is not None:
        return trial.suggest_categorical(name, each.choices)
    if each.integers is not None:
        return trial.suggest_int(name, *each.integers)
    return trial.suggest_float(name, *each.bounds, log=each.log is not None)


def _trials_of(study: optuna.Study) -> list[Trial]:
    from optuna.trial import TrialState

    found = []
    for each in study.get_trials(deepcopy=False):
        if each.state == TrialState.WAITING or not each.params:  # or about to start
            continue
        ended: Ended = each.user_attrs.get(_ENDED, "running")
        finished = each.state == TrialState.COMPLETE and ended == "finished"
        found.append(
            Trial(
                each.number,
                each.params,
                each.user_attrs.get(_VALUES, []),
                "running" if each.state == TrialState.RUNNING else ended,
                each.value if finished else None,
                each.intermediate_values,
            )
        )
    return found
