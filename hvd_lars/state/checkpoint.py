"""Save and restore the training state across ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.data.identity import DataIdentity
from hvd_lars.errors import UserError
from hvd_lars.runtime.terminal import warn
from hvd_lars.state import checkpoint_files
from hvd_lars.state.replicas import average_buffers, broadcast_and_verify
from hvd_lars.state.run_state import RunState


@final
class Checkpointer:
    """Checkpoints ``step-N`` under one folder; the newest ``keep_last`` and the best are kept.

    Each records ``data``, the identity of its data.
    """

    def __init__(
        self,
        folder: Path,
        comm: Communicator,
        keep_last: int = 2,
        data: DataIdentity | None = None,
    ) -> None:
        self._folder, self._comm, self._keep_last, self._data = folder, comm, keep_last, data
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, state: RunState, background: bool = False) -> tuple[Path, float]:
        """Write ``step-N`` with N = progress.step; collective, rank 0 writes.

        Args:
            state: buffers of model and average become their means over the ranks.
            background: return once the state is copied to host memory; a thread then writes it,
                and :meth:`finish` reports its errors.

        Returns:
            The checkpoint's folder, and the seconds that this call took.

        Raises:
            UserError: on every rank, if writing fails and not in the background; earlier
                checkpoints are untouched.
        """
        begun = time.perf_counter()
        self.finish()
        average_buffers(state.model, self._comm)
        if state.average is not None:
            average_buffers(state.average, self._comm)
        tensors, record = state.tensors(), state.progress.record()
        if self._comm.rank == 0:
            # Copies, since safetensors refuses tensors that share memory (tied weights).
            copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
            self._writer = threading.Thread(target=self._write, args=(copies, record))
            self._writer.start()
        if not background:
            self.finish(raising=True)
        target = checkpoint_files.folder_of(self._folder, state.progress.step)
        return target, time.perf_counter() - begun

    def finish(self, raising: bool = False) -> str | None:
        """Wait for the background write; returns the reason if it failed, on rank 0.

        Raises:
            UserError: on every rank, if it failed and ``raising`` is set; collective then.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if raising:
            on_root(self._comm, lambda: _raise(failure))
        elif failure is not None:
            warn(f"{failure}; the run continues")
        return failure

    def restore(self, state: RunState) -> None:
        """Load the newest sound checkpoint, as :func:`find_checkpoint` and :func:`restore`."""
        self.finish()
        restore(find_checkpoint(self._folder, self._comm), self._comm, state)

    def _write(self, tensors: dict[str, Tensor], record: dict[str, object]) -> None:
        try:
            checkpoint_files.write(self._folder, tensors, record, self._keep_last, self._data)
        except UserError as error:
            self._failure = str(error)
        except OSError as error:
            self._failure = f"{error.filename or self._folder}: {error.strerror or error}"


def _raise(failure: str | None) -> None:
    if failure is not None:
        raise UserError(failure)


def find_checkpoint(folder: Path, comm: Communicator) -> checkpoint_files.Found:
    """Return the newest sound checkpoint in ``folder``, or ``folder`` itself if it is one.

    Collective; rank 0 compares all checksums.  Damaged ones are reported on standard error and
    passed over.

    Raises:
        UserError: on every rank, if there is none or all are damaged.
    """
    found = look_for_checkpoint(folder, comm)
    if found is None:
        raise UserError(f"{folder}: no checkpoint (a folder step-N) in it")
    return found


def look_for_checkpoint(folder: Path, comm: Communicator) -> checkpoint_files.Found | None:
    """Do as :func:`find_checkpoint`, but return None if there is none."""
    found = on_root(comm, lambda: checkpoint_files.find(folder))
    if found is not None and comm.rank == 0:
        for line in found.passed_over:
            warn(f"{line}; using {found.folder}")
    return found


def restore(found: checkpoint_files.Found, comm: Communicator, state: RunState) -> None:
    """Load a checkpoint on every rank; collective.

    Only rank 0 reads.  A checksum then proves that all ranks hold the same bits.

    Raises:
        UserError: on every rank, if it is of another model.
    """

    def fill(live: dict[str, Tensor], names: list[str]) -> None:
        on_root(comm, lambda: checkpoint_files.read(found, live, names))

    load_state(found.names, fill, comm, state)
    state.restored(found.progress)


def load_state(
    stored: Collection[str],
    fill: Callable[[dict[str, Tensor], list[str]], None],
    comm: Communicator,
    state: RunState,
    root: int = 0,
) -> None:
    """Fill the state's tensors on rank ``root`` and send them to all ranks; collective.

    Args:
        stored: names of the available tensors, as in :meth:`RunState.tensors`.
        fill: copies values into its first argument, the live tensors, on ``root``; its second
            argument is the names in ``stored`` that are wanted.
        comm: the ranks.
        state: its tensors are overwritten; its progress is unchanged.
        root: the rank that has the values.
    """
    optimizer = state.optimizer
    slots: dict[Tensor, dict[str, Tensor]] = {}
    named: dict[str, Tensor] = {}
    for slot in () if optimizer is None else optimizer.slots:
        for name, param in state.model.named_parameters():
            if optimizer is not None and f"{slot}/{name}" in stored:
                named[f"{slot}/{name}"] = value = optimizer.new_slot(slot, param)
                slots.setdefault(param, {})[slot] = value
    live = named | RunState(state.model, average=state.average).tensors()
    wanted = {name.partition("/")[0] for name in live} | {"model"}
    with torch.no_grad():
        fill(live, [name for name in stored if name.partition("/")[0] in wanted])
    broadcast_and_verify(live, comm, root)
    for each, values in slots.items():
        assert optimizer is not None
        optimizer.set_slots(each, values)
