"""Ranks on hosts by the ``mpirun`` of Open MPI, or of MPICH and its kin."""

from __future__ import annotations

from hvd_lars.launchers.start import Request, Start, script


def start(request: Request) -> Start:
    """Return the start of launch/mpirun.sh, which detects the kind of mpirun."""
    return Start(["bash", str(script("mpirun.sh")), *request.training], request.variables())
