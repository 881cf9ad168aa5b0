"""A process's rank by its launcher's environment variables, before any backend starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvd_lars.errors import UserError


@dataclass(frozen=True)
class Launch:
    """One process's rank as the launcher's environment variables give it.

    Attributes:
        launcher: its name in messages.
        rank, size: rank and world size among all processes.
        local_rank: rank among the processes on this machine.
        local_size: processes on this machine; None if the launcher does not say.
        mpi: MPI_Init would find the other ranks.
        threads: cores of one rank; None if the launcher does not say.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    mpi: bool
    threads: int | None = None


_COUNT = re.compile(r"(\d+)(?:\(x\d+\))?")  # SLURM's 4(x2): 4 on each of 2 nodes
ALONE = Launch("no launcher", 0, 1, 0, 1, mpi=False)


@dataclass(frozen=True)
class Environment:
    """The environment variables that a launcher sets in the processes it starts.

    Attributes:
        launcher: its name in messages.
        rank, size, local_rank, local_size: the variables; local ones may be absent.
        mpi: MPI_Init would find the other ranks.
        also: a variable that must also be set.
        threads: the variable with the number of cores of one rank.
    """

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    mpi: bool = True
    also: str = ""
    threads: str = ""


# To add a launcher, add a line.  horovodrun and mpirun come first: they run inside a SLURM job
# and inherit its variables.
ENVIRONMENTS = (
    Environment(
        "horovodrun --gloo",
        *("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
        mpi=False,
    ),
    Environment(
        "mpirun (Open MPI)",
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    Environment(
        "mpirun (MPICH, Intel MPI)",
        *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        also="MPI_LOCALRANKID",  # srun --mpi=pmi2 sets the first two
    ),
    Environment(
        "mpirun (MVAPICH2)",
        *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    Environment(
        "srun",
        *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        also="SLURM_STEP_ID",  # a batch script has SLURM_PROCID=0 but is no task of srun
        threads="SLURM_CPUS_PER_TASK",
    ),
    Environment("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    Environment("a launcher with PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Environment("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", mpi=False),
)


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Read the launcher's variables; return ``ALONE`` if there are none.

    Raises:
        UserError: a variable is not a number, or rank and size contradict each other.
    """
    if "HOROVOD_RANK" in environment and "OMPI_COMM_WORLD_RANK" in environment:
        raise UserError(
            "the variables of horovodrun --gloo (HOROVOD_RANK) and of mpirun "
            "(OMPI_COMM_WORLD_RANK) are both set; start with one of them and unset the other's"
        )
    for known in ENVIRONMENTS:
        if any(name and name not in environment for name in (known.rank, known.size, known.also)):
            continue
        rank, size = _number(environment, known.rank), _number(environment, known.size)
        local = known.local_rank
        local_rank = _number(environment, local) if local in environment else 0
        if not 0 <= rank < size:
            raise UserError(
                f"{known.launcher}: {known.rank}={rank} and {known.size}={size} contradict each "
                f"other; the rank must be below the size"
            )
        local_size, threads = (
            int(match.group(1)) if (match := _COUNT.fullmatch(environment.get(name, ""))) else None
            for name in (known.local_size, known.threads)
        )
        return Launch(known.launcher, rank, size, local_rank, local_size, known.mpi, threads)
    return ALONE


def _number(environment: Mapping[str, str], key: str) -> int:
    try:
        return int(environment[key])
    except ValueError:
        raise UserError(f"{key}={environment[key]!r} in the environment is not a number") from None


def choose_backend(
    backend: str, launch: Launch, environment: Mapping[str, str], has_horovod: bool
) -> str:
    """Return the backend to start: ``horovod``, ``mpi`` or ``local``.

    Combinations that would run as unconnected jobs of one rank each, or crash, are refused before
    anything starts.

    Raises:
        UserError: launcher and backend are incompatible; the line says why and what to use.
    """
    ranks = f"{launch.launcher} started {launch.size} ranks"
    if launch.launcher == "torchrun" and launch.size > 1:
        raise UserError(
            f"{ranks}, which neither Horovod nor MPI can join; use horovodrun, mpirun or srun"
        )
    if backend == "auto":
        if launch.size == 1:
            return "local"
        if has_horovod:
            backend = "horovod"
        elif launch.mpi:
            backend = "mpi"
        else:
            raise UserError(
                f"{ranks}, but Horovod is not installed for this Python: run launch/quickstart.sh "
                f"or `python launch/build_horovod.py --install`, or use mpirun with mpi4py"
            )
    if backend == "local" and launch.size > 1:
        raise UserError(
            f"{ranks}, but comm.backend is local: each would train alone; use auto, horovod or mpi"
        )
    if backend == "horovod" and not has_horovod:
        raise UserError(
            "comm.backend is horovod, but Horovod is not installed for this Python: "
            "run `python launch/build_horovod.py --install`"
        )
    if backend == "mpi" and launch.size > 1 and not launch.mpi:
        raise UserError(
            f"{ranks} without MPI, but comm.backend is mpi: each would see itself alone; "
            f"use mpirun or srun, or comm.backend=horovod"
        )
    if backend == "horovod" and launch.mpi and launch.size > 1:
        _refuse_gloo_under_mpi(launch, environment, ranks)
    return backend


def _refuse_gloo_under_mpi(launch: Launch, environment: Mapping[str, str], ranks: str) -> None:
    """Raise UserError for Gloo settings that do not work under an MPI launcher."""
    if environment.get("HOROVOD_CONTROLLER", "").lower() == "gloo":
        raise UserError(
            f"{ranks}, but HOROVOD_CONTROLLER=gloo makes each of them a job of its own; unset it, "
            f"or start with horovodrun --gloo"
        )
    if environment.get("HOROVOD_CPU_OPERATIONS", "").lower() == "gloo":
        raise UserError(
            f"{ranks} on Horovod's MPI controller, where HOROVOD_CPU_OPERATIONS=gloo crashes; "
            f"unset it, or start with horovodrun --gloo"
        )


def check_backend_agrees(launch: Launch, backend: str, rank: int, size: int) -> None:
    """Compare rank and size of the backend with those of the launcher.

    Raises:
        UserError: they differ: N solo runs, or an MPI that is not the launcher's.
    """
    if launch is ALONE or (size, rank) == (launch.size, launch.rank):
        return  # without a launcher, trust the backend
    if size == 1:
        cause = (
            f"each would train alone: {backend} was probably built for another MPI than the "
            f"launcher's (`hvd-lars doctor` names both)"
        )
    else:
        cause = "ranks of different jobs are mixed; clear the other launcher's variables"
    raise UserError(
        f"{launch.launcher} says rank {launch.rank} of {launch.size}, but {backend} says rank "
        f"{rank} of {size}: {cause}"
    )
