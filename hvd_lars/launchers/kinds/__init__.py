"""Ways to start ranks, one per file; to add one, write its file and name it in ``KINDS``."""

from importlib import import_module

from hvd_lars.launchers.start import Request, Start

# From a value of ``--on`` to the module whose ``start`` makes the command.
KINDS = {
    "local": "local",
    "horovodrun": "horovodrun",
    "openmpi": "mpirun",
    "mpich": "mpirun",
    "slurm": "slurm",
    "pbs": "pbs",
    "lsf": "lsf",
    "kubernetes": "kubernetes",
}


def start_of(request: Request) -> Start:
    """Return the command for a request.

    Raises:
        UserError: the request's options do not fit its kind.
    """
    request.check_hosts()
    start: Start = import_module(f"{__name__}.{KINDS[request.kind]}").start(request)
    return start
