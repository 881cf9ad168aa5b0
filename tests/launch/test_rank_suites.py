"""Run the tests marked ``ranks`` under every real launcher; see tests/sessions.py."""

import re
import subprocess
from pathlib import Path

import pytest
from commands import warm_python
from sessions import SESSIONS

from hvd_lars.launchers.local import run_here

HANG_GUARD = 1800
TESTS = Path(__file__).parents[1]
LAUNCHERS = {"horovod": "mpirun", "mpi": "mpirun", "gloo": "horovodrun --gloo"}
OPTIONS = [
    "-m",
    "pytest",
    "-q",
    "--color=no",
    "-p",
    "no:cacheprovider",
    f"--rootdir={TESTS.parent}",
]


def suites():
    """Every file with a test over ranks: none has to be listed."""
    files = [path for path in TESTS.rglob("test_*.py") if "mark.ranks(" in path.read_text()]
    assert len(files) > 5
    return sorted(map(str, set(files) - {Path(__file__)}))


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [(kind, ranks) for kind in LAUNCHERS for ranks in SESSIONS[kind]],
)
def test_suites(kind, ranks):
    check(LAUNCHERS[kind], "mpi" if kind == "mpi" else "horovod", ranks, suites())


def test_the_contract_under_horovodrun_on_mpi():
    """As under mpirun, which it calls: the communicator alone."""
    check("horovodrun", "horovod", 2, [str(TESTS / "contract")])


def test_suites_alone(monkeypatch):
    monkeypatch.setenv("HVD_LARS_TEST_BACKEND", "local")
    result = subprocess.run(
        warm_python(*OPTIONS, *suites()),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def check(launcher, backend, ranks, files):
    environment = {"HVD_LARS_TEST_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    program = warm_python(*OPTIONS, *files)
    result = run_here(launcher, ranks, program, HANG_GUARD, environment)
    assert result.returncode == 0, result.stdout
    passed = [int(n) for n in re.findall(r"(\d+) passed", result.stdout)]
    assert len(passed) == ranks, result.stdout
    assert len(set(passed)) == 1, result.stdout
