"""Find where a run starts: fresh, at a checkpoint, or at an elastic job's snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvd_lars.assemble.resuming import (
    Resume,
    check_same_data,
    checkpoints_in,
    config_to_resume,
    stored_data,
)
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.data.identity import DataIdentity
from hvd_lars.runtime.files import expand_user
from hvd_lars.state import run_folder
from hvd_lars.state.checkpoint import find_checkpoint, look_for_checkpoint, restore
from hvd_lars.state.checkpoint_files import Found
from hvd_lars.state.replicas import broadcast_and_verify
from hvd_lars.state.run_state import RunState
from hvd_lars.state.snapshots import Newest, Snapshots


@dataclass(frozen=True)
class Start:
    """A resolved config and where its run starts; nothing is written yet.

    Attributes:
        config: config for the rest of the run.
        directory: requested run folder; None for a new one.
        continues: the folder already holds this run.
        other_data: the data may differ from the run's so far.
        checkpoint: verified checkpoint to load.
        snapshot: snapshot of an elastic job to load in place of a checkpoint.
    """

    config: Config
    directory: str | None
    continues: bool
    other_data: bool
    checkpoint: Found | None
    snapshot: Newest | None

    def check_data(self, identity: DataIdentity, comm: Communicator) -> None:
        """Compare the data with the run's so far.

        Raises:
            UserError: on every rank: the data differs, and that is not allowed.
        """
        where, before = None, None
        if self.checkpoint is not None:
            where, before = self.checkpoint.folder, self.checkpoint.data
        if before is None and self.continues:
            where = folder = expand_user(str(self.directory), "run.dir")
            before = on_root(comm, lambda: stored_data(folder))
        if where is not None:
            check_same_data(before, identity, self.other_data, where, comm.rank)

    def load(self, state: RunState, comm: Communicator, snapshots: Snapshots | None) -> None:
        """Load the initial state on every rank, and check that all hold the same bits.

        Raises:
            UserError: on every rank: the checkpoint is of another model.
            ReplicasDifferError: ranks do not hold the same bits.
        """
        if snapshots is not None and self.snapshot is not None and self.snapshot.tensors:
            snapshots.restore(self.snapshot, state, comm)
        elif self.checkpoint is not None:
            restore(self.checkpoint, comm, state)
        else:
            broadcast_and_verify(state.tensors(), comm)


def find_start(
    config: Config, comm: Communicator, resume: Resume | None, snapshots: Snapshots | None
) -> Start:
    """Resolve the config, and find and verify the state to start from; collective.

    Raises:
        UserError: on every rank alike: the run cannot be resumed, or its folder holds another.
    """
    snapshot = None if snapshots is None else snapshots.newest(comm)
    directory, other_data = config.run.dir, config.run.allow_other_data
    if snapshot is not None:
        config, directory = snapshot.settings
    elif resume is not None:
        asked = resume
        resume = found = on_root(comm, lambda: asked.in_own_folder(config))
        config = on_root(comm, lambda: config_to_resume(config, found))
    continues = snapshot is not None or (
        resume is not None and (resume.source is None or resume.again)
    )
    if directory is not None and not continues:
        wanted = directory
        on_root(comm, lambda: str(run_folder.refuse_other_run(wanted)))
    checkpoint = None
    if resume is not None and not (snapshot is not None and snapshot.tensors):
        checkpoint = _checkpoint_of(resume, Path(str(directory)), comm)
    # It applies to this command only: the run records the new data.
    config = config.with_values("run", allow_other_data=False)
    return Start(config, directory, continues, other_data, checkpoint, snapshot)


def _checkpoint_of(resume: Resume, own: Path, comm: Communicator) -> Found | None:
    """Return the checkpoint to resume from, or None if the run in ``own`` has none yet."""
    if resume.source is not None:
        return find_checkpoint(checkpoints_in(resume.source), comm)
    return look_for_checkpoint(expand_user(own, "run.dir") / run_folder.CHECKPOINTS, comm)
