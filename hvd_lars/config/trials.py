"""Configs of a study's trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_lars.config.binding import binding_of
from hvd_lars.config.file import with_keys
from hvd_lars.config.schema import Config
from hvd_lars.errors import UserError
from hvd_lars.settings.durations import Duration

# Keys that bind a run, but must be the same in all trials of one job.
_FIXED = {
    "train.duration": "tune.duration is the length of a trial",
    "model.bn_sync_ranks": "the groups of ranks are made once",
}


def check_space(config: Config) -> None:
    """Check that every key of ``tune.space`` can be tuned, and its extreme values are allowed.

    Raises:
        UserError: one line for every mistake, or there is no ``tune`` section.
    """
    if config.tune is None:
        raise UserError(
            "tune: missing; write the keys to tune and their ranges, as "
            "tune: {space: {schedule.base_lr: {log: [1, 64]}}}"
        )
    lines = []
    for key, values in config.tune.space.items():
        place = f"tune.space.{key}"
        if key in _FIXED:
            lines.append(f"{place}: cannot be tuned: {_FIXED[key]}")
            continue
        if binding_of(config, key) == "nothing":
            lines.append(f"{place}: cannot be tuned: it does not define what a run computes")
            continue
        for value in values.extremes():
            try:
                with_keys(config, {key: value}, place)
            except UserError as error:
                lines += str(error).splitlines()
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def trial_config(config: Config, params: Mapping[str, Any], seed: int, folder: str) -> Config:
    """Return the config of one run of a trial: shorter, without the search, in its own folder.

    Args:
        config: of the study.
        params: values by key.
        seed: offset to ``run.seed``.
        folder: of the run.
    """
    assert config.tune is not None
    found = tuned_config(config, params)
    own_seed = (config.run.seed + seed) % 2**32
    found = found.with_values("run", dir=folder, seed=own_seed, console="none", loggers=())
    return _shortened(found, trial_duration(config))


def trial_duration(config: Config) -> Duration:
    """Return the length of a study's trials: ``tune.duration``, or half of a run."""
    assert config.tune is not None
    return config.tune.duration or _scaled(config.train.duration, 0.5)


def tuned_config(config: Config, params: Mapping[str, Any]) -> Config:
    """Return the config of a whole run with a trial's values, without the search.

    Raises:
        UserError: the values do not go together.
    """
    found = with_keys(config, params, trial_with(params))
    return found.model_copy(update={"tune": None}).with_values("run", dir=None)


def trial_with(params: Mapping[str, Any]) -> str:
    """Return a trial's name in errors: its values by key."""
    return f"trial with {', '.join(f'{key}={value}' for key, value in params.items())}"


def _shortened(config: Config, duration: Duration) -> Config:
    """Return the config with another duration, and its schedule scaled to it."""
    share = duration.value / config.train.duration.value
    schedule = config.schedule
    config = config.with_values(
        "schedule",
        warmup_duration=_scaled(schedule.warmup_duration, share),
        milestones=tuple(_scaled(each, share) for each in schedule.milestones),
    )
    resizes = getattr(config.data, "progressive", ())
    if resizes:
        sizes = {round(each.epoch * share): each for each in resizes}  # the last of one epoch
        changed = [each.model_copy(update={"epoch": epoch}) for epoch, each in sizes.items()]
        config = config.with_values("data", progressive=tuple(changed))
    return config.with_values("train", duration=duration)


def _scaled(duration: Duration, share: float) -> Duration:
    value = duration.value * share
    if duration.unit != "epochs" and value > 0.0:  # whole, and still there
        value = max(1.0, float(round(value)))
    return Duration(value, duration.unit)
