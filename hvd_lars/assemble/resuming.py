"""Resume a run: check that its config and data permit it, and find where to start."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from hvd_lars.config.binding import changes
from hvd_lars.config.file import load_config
from hvd_lars.config.schema import Config
from hvd_lars.data.identity import DataIdentity, differences
from hvd_lars.errors import UserError
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.terminal import warn
from hvd_lars.state import run_folder
from hvd_lars.state.checkpoint_files import is_checkpoint, steps
from hvd_lars.tuning.study import is_study


def as_before(config: Config, stored: Config, given: Collection[str], where: Path) -> Config:
    """Return the config for the rest of a run that began under ``stored``.

    ``auto`` keeps the choices that were made then.

    Args:
        config: the user's config.
        stored: the run's config.
        given: keys set on the command line, which may differ.
        where: the file of ``stored``, for errors.

    Raises:
        UserError: another key that changes the mathematics differs; one line per key.
    """

    def describe(key: str, before: object, now: object) -> str:
        return (
            f"{key}: found {now!r}, the run has {before!r} ({where}); to change it, set {key}=… on "
            f"the command line"
        )

    if lines := changes(stored, config, "run", describe, given):
        raise UserError("\n".join(lines))
    for section, key in (
        ("optimizer", "kernel"),
        ("optimizer", "placement"),
        ("comm", "bucket_mb"),
    ):
        if getattr(getattr(config, section), key, None) == "auto":
            before = getattr(getattr(stored, section), key)
            config = config.with_values(section, **{key: before})
    return config


@dataclass(frozen=True)
class Resume:
    """How to resume a run.

    Attributes:
        source: run folder or checkpoint to start a new run folder from; None: resume in the run's
            own folder from its newest checkpoint, or start there if it has none yet.
        given: keys set on the command line.
        again: a run that began at ``source`` may be in its own folder already, and then goes on
            there: a scheduler starts the same command again.
    """

    source: Path | None
    given: tuple[str, ...]
    again: bool = False

    def in_own_folder(self, config: Config) -> Resume:
        """Return how to resume if the run's own folder has a checkpoint already."""
        if self.source is None or not self.again or config.run.dir is None:
            return self
        own = expand_user(config.run.dir, "run.dir") / run_folder.CHECKPOINTS
        return replace(self, source=None) if steps(own) else self


def config_to_resume(config: Config, resume: Resume) -> Config:
    """Return the config for the rest of the run.

    Raises:
        UserError: there is no such run, or its config differs.
    """
    if resume.source is None and config.run.dir is None:
        raise UserError("--resume: run.dir is not set; add run.dir=FOLDER of the run")
    path = resume.source or expand_user(str(config.run.dir), "run.dir")
    if resume.source is not None and not path.exists():
        raise UserError(f"--resume-from: {path}: no such run folder or checkpoint")
    if resume.source is None and is_study(path):
        raise UserError(f"run.dir: {path} holds a study of tune, not a run; name another folder")
    stored = stored_config(path)
    return config if stored is None else as_before(config, stored[0], resume.given, stored[1])


def stored_config(path: Path) -> tuple[Config, Path] | None:
    """Return the config and config.yaml of a run folder, or of the one around a checkpoint."""
    inside = path.name == run_folder.CHECKPOINTS or is_checkpoint(path)
    for folder in (path, *path.absolute().parents[: 2 if inside else 0]):
        file = folder / run_folder.CONFIG
        if file.is_file() and file.stat().st_size:  # empty if the run died at its start
            return load_config(str(file), run_folder.ANYWHERE), file
    return None


def checkpoints_in(path: Path) -> Path:
    """Return the folder to search for checkpoints: a run folder's own, else the path itself."""
    inside = path / run_folder.CHECKPOINTS
    return inside if inside.is_dir() else path


def stored_data(folder: Path) -> DataIdentity | None:
    """Return the identity of a run's data from its folder, or None if not recorded.

    Raises:
        UserError: the file is unreadable or damaged.
    """
    path = folder / run_folder.DATA
    try:
        return DataIdentity.from_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {reason}") from None


def check_same_data(
    then: DataIdentity | None,
    now: DataIdentity,
    allowed: bool,
    where: Path,
    rank: int,
    only_eval: bool = False,
) -> None:
    """Compare the data with that of the run or checkpoint ``where``; rank 0 warns of changes.

    With ``only_eval``, compare only classes and evaluation images.

    Raises:
        UserError: the data differs, and that is not ``allowed``.
    """
    found = [] if then is None else differences(then, now, only_eval)
    if found and not allowed:
        raise UserError(
            f"data: differs from that of {where}: {'; '.join(found)}; "
            f"run.allow_other_data=true on the command line accepts it"
        )
    if found and rank == 0:
        warn(f"data: differs from that of {where}, and is accepted: {'; '.join(found)}")
