"""Saving and restoring the state of training over ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.data.identity import DataIdentity
from hvd_lars.errors import UserError
from hvd_lars.optim import LARS
from hvd_lars.runtime.terminal import warn
from hvd_lars.state import checkpoint_files
from hvd_lars.state.progress import Progress
from hvd_lars.state.replicas import average_buffers, broadcast_and_verify, named_state


@final
class Checkpointer:
    """Checkpoints ``step-N`` under one folder; the newest ``keep_last`` and the best are kept.

    Each says that it is of ``data``.
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

    def save(
        self,
        model: nn.Module,
        optimizer: LARS,
        progress: Progress,
        average: nn.Module | None = None,
        beside: bool = False,
    ) -> tuple[Path, float]:
        """Write ``step-N`` with N = progress.step; collective, rank 0 writes.

        ``beside`` lets training go on when the state has been copied to the host's memory; a
        thread then writes it, and what it meets is told by :meth:`finish`.

        Returns:
            The checkpoint's folder, and the seconds that this call took.

        Raises:
            UserError: on every rank, when the file system refuses and not ``beside``; earlier
                checkpoints are untouched.
        """
        begun = time.perf_counter()
        self.finish()
        average_buffers(model, self._comm)
        if average is not None:
            average_buffers(average, self._comm)
        state = named_state(model, optimizer, average)
        record = progress.record()
        if self._comm.rank == 0:
            # Copies, since safetensors refuses tensors that share memory (tied weights).
            copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}
            self._writer = threading.Thread(target=self._write, args=(copies, record))
            self._writer.start()
        if not beside:
            self.finish(raising=True)
        target = checkpoint_files.folder_of(self._folder, progress.step)
        return target, time.perf_counter() - begun

    def finish(self, raising: bool = False) -> str | None:
        """Wait for the writing that goes on; the line that says why one failed, on rank 0.

        Raises:
            UserError: on every rank, it failed and that is to be an error; collective then.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if raising:
            on_root(self._comm, lambda: _raise(failure))
        elif failure is not None:
            warn(f"{failure}; the run goes on")
        return failure

    def restore(
        self,
        model: nn.Module,
        optimizer: LARS | None = None,
        average: nn.Module | None = None,
    ) -> Progress:
        """Load the newest sound checkpoint; as :func:`find_checkpoint` and :func:`restore`."""
        self.finish()
        found = find_checkpoint(self._folder, self._comm)
        return restore(found, self._comm, model, optimizer, average)

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
    """The newest sound checkpoint in ``folder``, or ``folder`` itself where it is one.

    Collective; rank 0 reads all of it to compare checksums.  Damaged ones are named on standard
    error and passed over.

    Raises:
        UserError: on every rank: there is none, or all are damaged.
    """
    found = look_for_checkpoint(folder, comm)
    if found is None:
        raise UserError(f"{folder}: no checkpoint (a folder step-N) in it")
    return found


def look_for_checkpoint(folder: Path, comm: Communicator) -> checkpoint_files.Found | None:
    """As :func:`find_checkpoint`, but None where there is none."""
    found = on_root(comm, lambda: checkpoint_files.find(folder))
    if found is not None and comm.rank == 0:
        for line in found.passed_over:
            warn(f"{line}: taking {found.folder}")
    return found


def restore(
    found: checkpoint_files.Found,
    comm: Communicator,
    model: nn.Module,
    optimizer: LARS | None = None,
    average: nn.Module | None = None,
) -> Progress:
    """Load a checkpoint on every rank; its progress.  Collective.

    Only rank 0 reads.  Momentum is sent before parameters, and a checksum then proves that all
    ranks hold the same bits.

    Raises:
        UserError: on every rank: it is of another model.
    """

    def fill(live: dict[str, Tensor], names: list[str]) -> None:
        on_root(comm, lambda: checkpoint_files.read(found, live, names))

    load_state(found.names, fill, comm, model, optimizer, average)
    return found.progress


def load_state(
    stored: Collection[str],
    fill: Callable[[dict[str, Tensor], list[str]], None],
    comm: Communicator,
    model: nn.Module,
    optimizer: LARS | None = None,
    average: nn.Module | None = None,
    root: int = 0,
) -> None:
    """Let rank ``root`` fill the live tensors and all ranks take them; collective.

    Args:
        stored: names that there are, as :func:`named_state` gives them.
        fill: copies into the live tensors that it is given, on ``root``; its second argument are
            those of ``stored`` that are wanted.
        comm: the ranks.
        model: is filled, and
        optimizer: its momentum, and
        average: the moving average, where they are given.
        root: who has the values.
    """
    live = named_state(model, average=average)
    momentum: dict[Tensor, Tensor] = {}
    if optimizer is not None:
        momentum = {
            param: torch.zeros_like(param)
            for name, param in model.named_parameters()
            if f"momentum/{name}" in stored
        }
        live = {
            f"momentum/{name}": momentum[param]
            for name, param in model.named_parameters()
            if param in momentum
        } | live
    wanted = {name.partition("/")[0] for name in live} | {"model"}
    with torch.no_grad():
        fill(live, [name for name in stored if name.partition("/")[0] in wanted])
    broadcast_and_verify(live, comm, root)
    for param, value in momentum.items():
        assert optimizer is not None
        optimizer.set_momentum(param, value)
