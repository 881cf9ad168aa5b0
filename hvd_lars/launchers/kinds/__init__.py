"""One file a way to start ranks; to add one, write its file and add it to ``KINDS``."""

from collections.abc import Callable

from hvd_lars.launchers.kinds import horovodrun, kubernetes, local, lsf, mpirun, pbs, slurm
from hvd_lars.launchers.start import Request, Start

KINDS: dict[str, Callable[[Request], Start]] = {
    "local": local.start,
    "horovodrun": horovodrun.start,
    "openmpi": mpirun.start,
    "mpich": mpirun.start,
    "slurm": slurm.start,
    "pbs": pbs.start,
    "lsf": lsf.start,
    "kubernetes": kubernetes.start,
}
