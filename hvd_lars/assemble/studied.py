"""Read a study back, for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_lars.config.file import load_config
from hvd_lars.config.trials import trial_duration
from hvd_lars.errors import UserError
from hvd_lars.state import run_folder
from hvd_lars.tuning import TuneSettings
from hvd_lars.tuning.study import Trial, read_trials


@dataclass(frozen=True)
class StudyRecord:
    """The contents of a study's folder."""

    name: str
    settings: TuneSettings
    duration: str  # of a trial
    global_batch: int
    trials: Sequence[Trial]


def read_study(folder: Path) -> StudyRecord:
    """Read a study's folder; of an unfinished study, the trials so far.

    Raises:
        UserError: it is not one, or Optuna is missing.
    """
    path = folder / run_folder.CONFIG
    run_folder.require_run(folder)
    config = load_config(str(path), run_folder.ANYWHERE)
    if config.tune is None:
        raise UserError(f"{path}: has no section tune")
    return StudyRecord(
        name=folder.absolute().name,
        settings=config.tune,
        duration=str(trial_duration(config)),
        global_batch=config.train.global_batch,
        trials=read_trials(folder),
    )
