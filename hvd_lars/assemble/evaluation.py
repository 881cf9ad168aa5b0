"""Evaluation of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hvd_lars.assemble.dataset import build_source
from hvd_lars.assemble.network import build_network
from hvd_lars.assemble.resuming import check_same_data
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.errors import UserError
from hvd_lars.health.agreement import Agreement
from hvd_lars.launchers.environment import Launch
from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.runtime.device import choose_device, set_threads
from hvd_lars.state import run_folder
from hvd_lars.state.checkpoint import find_checkpoint, restore
from hvd_lars.state.checkpoint_files import choose
from hvd_lars.state.run_state import RunState
from hvd_lars.train.evaluation import Evaluation, Evaluator


def evaluate_run(
    folder: Path, config: Config, comm: Communicator, launch: Launch, which: str = "latest"
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate a checkpoint of a run folder, and its averaged weights; collective.

    ``which`` selects the checkpoint, as in :func:`checkpoint_files.choose`.

    Raises:
        UserError: on every rank alike: there is no sound checkpoint, the data differs from the
            run's, or more than ``data.max_bad_fraction`` of it is unreadable.
    """
    set_threads(config.train.threads, launch)
    device = choose_device(comm.local_rank)
    chosen = on_root(comm, lambda: choose(folder / run_folder.CHECKPOINTS, which))
    found = find_checkpoint(chosen, comm)
    source = build_source(config, comm, device, only_eval=True)
    allowed = config.run.allow_other_data
    check_same_data(found.data, source.identity, allowed, found.folder, comm.rank, only_eval=True)
    model = build_network(config.model, config.data, source.num_classes, device)
    decay = config.model.ema_decay
    average = None if decay is None else MovingAverage(model, decay)
    restore(found, comm, RunState(model, average=average))
    agreement = Agreement(
        comm,
        unreadable=source.unreadable,
        num_train=source.num_train,
        num_eval=source.num_eval,
        max_bad_fraction=config.data.tolerated_bad_fraction,
    )
    too_many: list[UserError] = []

    def note_unreadable() -> bool:
        try:
            agreement.decide()
        except UserError as error:  # raised after all unreadable images are named
            too_many.append(error)
        return False

    train, workers = config.train, config.data.num_workers
    evaluator = Evaluator(source, comm, train.eval_batch, device, workers)
    try:
        result = evaluator.evaluate(model, note_unreadable)
    except UserError as error:
        too_many.insert(0, error)
    if too_many:
        raise too_many[-1]
    assert result is not None  # note_unreadable never asks to stop
    return result, None if average is None else evaluator.evaluate(average.module)
