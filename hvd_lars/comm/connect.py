"""From the launcher's variables to a working communicator."""

from __future__ import annotations

import importlib.util
import os
import socket

from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError
from hvd_lars.launchers.environment import check_backend_agrees, choose_backend, detect_launch


def connect(
    backend: str = "auto",
    expect_world_size: int | None = None,
    groups: bool = False,
    parts: bool = False,
) -> Communicator:
    """Start the backend that fits the launcher.

    Args:
        backend: ``auto``, ``horovod``, ``mpi`` (mpi4py alone) or ``local`` (one process).
        expect_world_size: required number of ranks; None accepts any.
        groups: :meth:`Communicator.group` will be called.
        parts: reduce-scatter and all-gather will be called: Horovod on MPI then leaves them to
            mpi4py if it is installed, several times faster on CPU.

    Raises:
        UserError: the launcher, backend and expected world size contradict each other.
    """
    launch = detect_launch(os.environ)
    has_horovod = importlib.util.find_spec("horovod") is not None
    chosen = choose_backend(backend, launch, os.environ, has_horovod)
    if chosen == "horovod" and not launch.mpi:
        _check_own_name()
    mpi_parts = parts and launch.mpi and importlib.util.find_spec("mpi4py") is not None
    comm = _start(chosen, groups, mpi_parts)
    if os.environ.get("HOROVOD_ELASTIC") != "1":  # there the variables are of the first attempt
        check_backend_agrees(launch, chosen, comm.rank, comm.size)
    if expect_world_size not in (None, comm.size):
        raise UserError(
            f"run.expect_world_size is {expect_world_size}, but {launch.launcher} gives "
            f"{comm.size} rank{'s' if comm.size > 1 else ''}"
        )
    return comm


def _check_own_name() -> None:
    """Check that this host's own name resolves; Gloo crashes otherwise, on any interface.

    Raises:
        UserError: the name does not resolve.
    """
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UserError(
            f"this host's own name {name} does not resolve ({error.strerror}), without which "
            f"Horovod on Gloo crashes: add a line `127.0.0.1 {name}` to /etc/hosts, or start with "
            f"mpirun"
        ) from None


def _start(backend: str, groups: bool, mpi_parts: bool) -> Communicator:
    try:
        if backend == "horovod":
            from hvd_lars.comm.horovod import HorovodCommunicator

            return HorovodCommunicator(groups, mpi_parts)
        if backend == "mpi":
            from hvd_lars.comm.mpi import MpiCommunicator

            return MpiCommunicator()
    except (ImportError, RuntimeError) as error:  # missing, or built for another one
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"comm.backend {backend} does not start: {first_line}") from error
    from hvd_lars.comm.local import LocalCommunicator

    return LocalCommunicator()
