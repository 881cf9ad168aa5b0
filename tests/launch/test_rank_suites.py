"""Run the tests marked ``ranks`` under every real launcher and backend."""

import re
import sys

import pytest

from hvd_lars.launchers.local import run_here

HANG_GUARD = 1800
RANK_TESTS = [
    "tests/contract",
    "tests/test_ranks.py",
    "tests/test_batch_norm.py",
    "tests/test_horovod_optimizer.py",
    "tests/test_loop.py",
    "tests/test_recorder.py",
    "tests/peers/test_life_cycle.py",
]

# Where all of them run; elsewhere the communicator's contract, which they stand on.  Gloo polls:
# more than two ranks take minutes on two cores.
WHOLE = {
    ("mpirun", "horovod"): (2, 3, 4),
    ("mpirun", "mpi"): (2, 4),
    ("horovodrun --gloo", "horovod"): (2,),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("launcher", "backend"),
    [
        ("mpirun", "horovod"),
        ("mpirun", "mpi"),
        ("horovodrun --gloo", "horovod"),
    ],
)
def test_suite(request, launcher, backend, ranks):
    whole = ranks in WHOLE[launcher, backend]
    check_suite(request, launcher, backend, ranks, RANK_TESTS if whole else RANK_TESTS[:1])


def test_suite_under_horovodrun_on_mpi(request):
    """As under mpirun, which it calls: the communicator alone."""
    check_suite(request, "horovodrun", "horovod", 2, RANK_TESTS[:1])


@pytest.mark.parametrize(
    ("launcher", "backend", "ranks"),
    [
        ("mpirun", "horovod", 2),
        ("mpirun", "horovod", 3),
        ("mpirun", "horovod", 5),
        ("mpirun", "horovod", 8),
        ("mpirun", "mpi", 4),
        ("horovodrun --gloo", "horovod", 2),
    ],
)
def test_sharded_suite(request, launcher, backend, ranks):
    few = ["-k", "not 59"] if ranks > 4 or "gloo" in launcher else []  # they take minutes
    check_suite(request, launcher, backend, ranks, ["tests/test_sharded.py", *few])


@pytest.mark.parametrize(("backend", "ranks"), [("horovod", 2), ("horovod", 3), ("mpi", 2)])
def test_fast_paths_suite(request, backend, ranks):
    check_suite(request, "mpirun", backend, ranks, ["tests/test_fast_paths.py"])


def test_every_bundled_config_takes_steps_over_two_ranks(request):
    check_suite(request, "mpirun", "horovod", 2, ["tests/test_recipes.py"])


def check_suite(request, launcher, backend, ranks, tests=RANK_TESTS):
    pytest_here = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    program = [
        *pytest_here,
        f"--rootdir={request.config.rootpath}",
        *(str(request.config.rootpath / t) if t.startswith("tests/") else t for t in tests),
    ]
    environment = {"HVD_LARS_TEST_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    result = run_here(launcher, ranks, program, HANG_GUARD, environment)
    assert result.returncode == 0, result.stdout
    passed = [int(n) for n in re.findall(r"(\d+) passed", result.stdout)]
    assert len(passed) == ranks, result.stdout
    assert len(set(passed)) == 1, result.stdout


def test_suite_alone(request, monkeypatch):
    import subprocess

    from hvd_lars.launchers.local import this_python

    program = this_python("-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *RANK_TESTS)
    monkeypatch.setenv("HVD_LARS_TEST_BACKEND", "local")
    result = subprocess.run(
        program, cwd=request.config.rootpath, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
