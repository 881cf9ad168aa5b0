"""What the launcher says of this process's rank, before any backend starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvd_lars.errors import UserError


@dataclass(frozen=True)
class Launch:
    """One process's place as the launcher's environment variables give it.

    ``launcher`` is how a person would name it; ``mpi`` says whether MPI_Init would find the
    other ranks; ``local_size`` is None where the launcher does not tell.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    mpi: bool


ALONE = Launch("no launcher", 0, 1, 0, 1, mpi=False)

# launcher, variables of rank, size, local rank, local size, whether MPI_Init joins the ranks.
# Order matters: horovodrun and mpirun run inside a SLURM job and inherit its variables.
_VARIABLES = [
    (
        "horovodrun --gloo",
        ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
        False,
    ),
    (
        "mpirun (Open MPI)",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        True,
    ),
    (
        "mpirun (MPICH, Intel MPI)",
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        True,
    ),
    (
        "mpirun (MVAPICH2)",
        (
            "MV2_COMM_WORLD_RANK",
            "MV2_COMM_WORLD_SIZE",
            "MV2_COMM_WORLD_LOCAL_RANK",
            "MV2_COMM_WORLD_LOCAL_SIZE",
        ),
        True,
    ),
    (
        "srun",
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
        True,
    ),
    (
        "jsrun",
        ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", ""),
        True,
    ),
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), False),
]


def detect_launch(environment: Mapping[str, str]) -> Launch:
    """Read the launcher's variables; ``ALONE`` where there are none.

    Raises:
        UserError: a variable is not a number, or rank and size contradict each other.
    """
    if "HOROVOD_RANK" in environment and "OMPI_COMM_WORLD_RANK" in environment:
        raise UserError(
            "the variables of horovodrun --gloo (HOROVOD_RANK) and of mpirun "
            "(OMPI_COMM_WORLD_RANK) are both set; start with one of them and unset the other's"
        )
    for launcher, (rank_key, size_key, local_key, local_size_key), mpi in _VARIABLES:
        if rank_key not in environment or size_key not in environment:
            continue
        if launcher == "srun" and "SLURM_STEP_ID" not in environment:
            continue  # a batch script itself: it has SLURM_PROCID=0 but is no task of srun
        rank = _number(environment, rank_key)
        size = _number(environment, size_key)
        local_rank = _number(environment, local_key) if local_key in environment else 0
        text = environment.get(local_size_key, "")
        local_size = int(text) if text.isdigit() else None
        if not 0 <= rank < size:
            raise UserError(
                f"{launcher}: {rank_key}={rank} and {size_key}={size} contradict each other; "
                f"the rank must be below the size"
            )
        return Launch(launcher, rank, size, local_rank, local_size, mpi)
    return ALONE


def _number(environment: Mapping[str, str], key: str) -> int:
    try:
        return int(environment[key])
    except ValueError:
        raise UserError(f"{key}={environment[key]!r} in the environment is not a number") from None


def choose_backend(
    backend: str, launch: Launch, environment: Mapping[str, str], has_horovod: bool
) -> str:
    """The backend to start: ``horovod``, ``mpi`` or ``local``.

    Refuses, before anything starts, the combinations that would run as many unconnected jobs of
    one rank, or crash.

    Raises:
        UserError: the launcher and the backend do not fit; the line says why and what would.
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
    """Refuse Gloo settings that an MPI launcher does not serve."""
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
    """Compare what the backend reports with what the launcher said.

    Raises:
        UserError: they differ: N solo runs, or an MPI that is not the launcher's.
    """
    if launch is ALONE or (size, rank) == (launch.size, launch.rank):
        return  # without a launcher's word the backend's is taken
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
