"""Ranks on hosts by the ``mpirun`` of Open MPI, or of MPICH and its kin."""

from __future__ import annotations

from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """launch/mpirun.sh, which asks mpirun for its kind."""
    return Start(["bash", str(script("mpirun.sh")), *request.training], request.variables())
