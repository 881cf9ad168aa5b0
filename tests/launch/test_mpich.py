"""Two ranks under MPICH and Intel MPI, from PyPI: launch/mpirun.sh and the mpi backend."""

import os
import subprocess
import sys
from pathlib import Path

import mpi4py
import pytest
from commands import HANG_GUARD, records_of

from hvd_lars.launchers.local import launcher_environment

SCRIPT = Path(__file__).parents[2] / "launch/mpirun.sh"


@pytest.fixture(scope="module", params=["mpich", "impi-rt"])
def hydra(tmp_path_factory, request):
    """The environment in which mpirun is the package's and mpi4py finds its library."""
    package = request.param
    folder = tmp_path_factory.mktemp(package)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "-q", package]
    found = subprocess.run(pip, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"no {package} from PyPI: {found.stderr[-200:]}")
    environment = launcher_environment() | {"MPI4PY_MPIABI": "mpich", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    environment |= {"LD_LIBRARY_PATH": str(folder / "lib"), "I_MPI_ROOT": str(folder)}
    return environment | {"NP": "2"}


def train(hydra, run, *options):
    steps = ["train.duration=40 steps", "schedule.warmup_duration=5 steps"]
    return subprocess.run(
        ["bash", SCRIPT, "digits", f"run.dir={run}", *steps, *options],
        env=hydra, capture_output=True, text=True, timeout=HANG_GUARD, check=False,
    )  # fmt: skip


def test_two_ranks_train(hydra, tmp_path):
    if not list(Path(mpi4py.__file__).parent.glob("MPI.*mpich*")):
        pytest.skip("this mpi4py was built for the site's MPI; PyPI's wheel speaks to MPICH too")
    run = tmp_path / "run"
    found = train(hydra, run, "comm.backend=mpi", "optimizer.placement=sharded")
    assert found.returncode == 0, found.stderr
    assert "2 ranks on mpi" in found.stdout
    assert records_of(run, "event")[0]["world_size"] == 2
    assert records_of(run, "eval")[-1]["step"] == 40


def test_horovod_of_another_mpi_is_refused(hydra, tmp_path):
    """Horovod here is built for Open MPI: under MPICH every rank would train alone."""
    found = train(hydra, tmp_path / "run", "comm.backend=horovod")
    assert found.returncode != 0
    assert "Traceback" not in found.stderr
    assert "rank" in found.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
