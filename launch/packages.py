"""Choose what the set-up installs and with which program: PyTorch's build, pip or uv."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain import fail

DRIVER = Path("/proc/driver/nvidia/version")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# GB to download and GB on disk: the wheels of torch 2.11.0 and torchvision 0.26.0 for x86-64 and
# those that they need, as the indexes list them, and an environment's folder after the set-up.
SIZES = {"cuda": (2.9, 5.5), "cpu": (0.2, 1.3)}
OTHERS = 0.3  # GB to download for all other packages, those of the tests included
BUILD_MINUTES = "3 to 12 minutes on two cores"

# pip's settings that uv does not read.
_INDEX_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index", "cert", "proxy")
_UV_SETTINGS = ("UV_CONFIG_FILE", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX", "UV_FIND_LINKS", "UV_INDEX")
_SCHEDULERS = ("sbatch", "qsub", "bsub")

Build = Literal["cuda", "cpu", "keep"]


@dataclass(frozen=True)
class Torch:
    """The PyTorch to install.

    Attributes:
        build: with CUDA, for CPUs, or the one that is installed.
        index: a package index to install it from; None for the one that pip uses.
        reason: for the choice.
    """

    build: Build
    index: str | None
    reason: str

    def is_installed(self, version: str | None) -> bool:
        """Return whether an installed version is of this build; none counts if it is None."""
        if self.build == "keep":
            return True
        return version is not None and ("+cpu" in version) == (self.build == "cpu")


def gpu_sign() -> str | None:
    """Return why GPUs may be used from here, or None if nothing says so.

    A cluster's login node has no GPU but compiles for nodes that do.
    """
    if DRIVER.exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA driver"
    if os.environ.get("CUDA_HOME") or shutil.which("nvcc"):
        return "a CUDA toolkit"
    scheduler = next((name for name in _SCHEDULERS if shutil.which(name)), None)
    return f"a scheduler ({scheduler})" if scheduler else None


def choose_torch(asked: Build | None, index: str | None, installed: str | None) -> Torch:
    """Return the PyTorch to install.

    Args:
        asked: the build that the user wants, if any.
        index: the package index to take it from, if the user named one.
        installed: the version in the environment, if any; one for CPUs stays one.
    """
    if asked == "keep":
        if index is not None:
            fail("--torch-index: with --torch keep, PyTorch is not installed")
        return Torch("keep", None, "--torch keep")
    if asked is not None:
        default = CPU_INDEX if asked == "cpu" else None
        return Torch(asked, index or default, f"--torch {asked}")
    if index is not None:
        build: Build = "cpu" if index.rstrip("/").endswith("/cpu") else "cuda"
        return Torch(build, index, "--torch-index")
    if installed is not None:
        if "+cpu" in installed:
            return Torch("cpu", CPU_INDEX, "as installed")
        return Torch("cuda", None, "as installed")
    sign = gpu_sign()
    if sign is not None:
        return Torch("cuda", None, f"found {sign}")
    problem = why_unreachable(CPU_INDEX)
    if problem is not None:
        return Torch("cuda", None, f"{CPU_INDEX} cannot be reached: {problem}")
    return Torch("cpu", CPU_INDEX, "found no NVIDIA driver, no CUDA toolkit, no scheduler")


def why_unreachable(index: str) -> str | None:
    """Return why a package index does not answer, or None if it does."""
    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=10).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None


def announce(torch: Torch, requirement: str, folder: Path) -> list[str]:
    """Return lines that say what will be downloaded; exit if the disk is too full for it."""
    download, disk = SIZES[torch.build]
    other = "cpu" if torch.build == "cuda" else "cuda"
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free / 1e9
    if free < disk:
        hint = "; --torch cpu needs less" if torch.build == "cuda" else ""
        fail(f"{folder}: {free:.1f} GB free, PyTorch with all it needs takes {disk} GB{hint}")
    names = {"cuda": "with CUDA", "cpu": "for CPUs"}
    return [
        f"{requirement} {names[torch.build]} ({torch.reason}; --torch {other} for the other build) "
        f"from {torch.index or 'the package index'}: {download} GB to download",
        f"other packages: up to {OTHERS} GB to download; {disk} GB on disk ({free:.0f} free)",
        f"then Horovod is built in {BUILD_MINUTES}, or taken from the cache of an earlier build",
    ]


def installed_versions(python: Path) -> dict[str, str]:
    """Return the versions of the packages that ``python`` sees, by normalised name."""
    if not python.exists():
        return {}
    program = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name}))"
    )
    result = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if result.returncode != 0:  # its Python is gone
        return {}
    return {normalise(name): version for name, version in json.loads(result.stdout).items()}


def normalise(name: str) -> str:
    """Normalise a package name as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(constraints: str, name: str) -> str:
    """Return ``name==version`` for this Python, as constraints have it, or the name alone."""
    for line in constraints.splitlines():
        requirement, _, marker = line.partition(";")
        if normalise(requirement.split("==")[0].strip()) == name and _holds(marker):
            return requirement.strip()
    return name


def _holds(marker: str) -> bool:
    """Evaluate one of the markers that constraints.txt uses: python_version < or >= a version."""
    found = re.fullmatch(r'\s*python_version\s*(<|>=)\s*"3\.(\d+)"\s*', marker)
    if found is None:
        return True
    older = sys.version_info[1] < int(found.group(2))
    return older if found.group(1) == "<" else not older


def installer(python: Path) -> tuple[list[str], str]:
    """Return a command that installs into a Python's environment, and why it was chosen.

    uv is quicker, but knows nothing of a site's mirrors and proxies that pip is configured for.
    """
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    uv = shutil.which("uv")
    if uv is None:
        return pip, "pip: there is no uv on PATH"
    if sees_system_packages(python):
        return pip, "pip: uv does not see the packages that the environment takes from outside"
    if not any(name.startswith(_UV_SETTINGS) for name in os.environ):
        settings = pip_settings(python)
        only_pips = [name for name in _INDEX_SETTINGS if name in settings]
        if only_pips:
            return pip, f"pip: uv does not read its setting {only_pips[0]} (set uv's to use it)"
    return [uv, "pip", "install", "--python", str(python)], f"uv: {uv}"


def sees_system_packages(python: Path) -> bool:
    """Return whether an environment shows the packages of the Python that it was created with."""
    config = python.parent.parent / "pyvenv.cfg"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return "include-system-site-packages = true" in text


def pip_settings(python: Path) -> Mapping[str, str]:
    """Return pip's settings from its files and the environment, by name."""
    command = [python, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"^[^\s=]*\.([\w-]+)='(.*)'$", result.stdout, re.MULTILINE)
    return dict(found)


def torch_command(command: Sequence[str], torch: Torch, constraints: str) -> list[str]:
    """Return the command that installs PyTorch and torchvision from the index for them."""
    index = [] if torch.index is None else ["--index-url", torch.index]
    return [*command, *index, pinned(constraints, "torch"), pinned(constraints, "torchvision")]
