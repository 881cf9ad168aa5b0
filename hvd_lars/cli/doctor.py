"""``hvd-lars doctor``: check the packages and whether ranks can sum, and suggest fixes.

The test ranks run ``python -m hvd_lars.cli.doctor``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from hvd_lars.cli.command import add_config, load_config
from hvd_lars.errors import UserError
from hvd_lars.launchers.local import (
    LAUNCHERS,
    find_program,
    launcher_environment,
    mpirun_version,
    run_here,
    this_python,
)
from hvd_lars.state.run_folder import environment_facts

NAME, HELP = "doctor", "check the installation; exit 1 if it cannot train"
EPILOG = "Example: hvd-lars doctor my.yaml --ranks 8"
BUILD = "python launch/build_horovod.py --install"

_HOROVOD_FACTS = """
import json, pathlib, horovod, horovod.torch as hvd
record = pathlib.Path(horovod.__file__).with_name("hvd_lars_built_from.json")
built_from = json.loads(record.read_text()) if record.exists() else None
built = [hvd.mpi_built(), hvd.gloo_built(), hvd.nccl_built()]
print(json.dumps([horovod.__version__, *built, built_from]))
"""
_MPI_FACTS = """
import mpi4py
from mpi4py import MPI
library = MPI.Get_library_version().splitlines()[0].split(", package")[0]
print(f"{mpi4py.__version__}, on {library}")
"""
_TORCH_FACTS = """
import json, torch
cuda = torch.cuda.is_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps([torch.__version__, torch.version.cuda, nccl, gpus]))
"""


@dataclass(frozen=True)
class Problem:
    """A problem and how to fix it; ``fatal`` if training cannot work."""

    what: str
    mend: str
    fatal: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, its ranks and the size of the test."""
    add_config(parser, default="resnet50-lars-b8192")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks on this machine")
    parser.add_argument("--megabytes", type=int, default=64, help="MiB of the test all-reduce")
    parser.add_argument(
        "--no-ranks",
        action="store_true",
        help="start no ranks, as on a login node where MPI may not run",
    )


def run(options: argparse.Namespace) -> int:
    """Print the diagnosis."""
    for option in ("megabytes", "ranks"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}: found {getattr(options, option)}; must be 1 or more")
    config = load_config(options.config, options.overrides)
    train = config.train
    needed = config.data.shared_bytes(train.micro_batch, train.eval_batch) * options.ranks
    megabytes = None if options.no_ranks else options.megabytes
    return diagnose(megabytes, options.config, options.ranks, needed)


def diagnose(megabytes: int | None, config: str, ranks: int, shared_bytes: int) -> int:
    """Print the state of the installation; return 0 if training works here, else 1.

    Args:
        megabytes: size of the test all-reduce, in MiB; None to start no ranks.
        config: name of the config to run.
        ranks: its ranks on this machine.
        shared_bytes: bytes of /dev/shm that their batches need.
    """
    problems: list[Problem] = []
    facts = environment_facts()
    _row("machine", f"{facts['cores']} cores, {facts['processor']}")
    _row("python", f"{facts['python']} ({sys.executable})")
    _diagnose_shared_memory(problems, config, ranks, shared_bytes)
    torch_version, has_gpu = _diagnose_torch(problems)
    has_horovod = _diagnose_horovod(problems, torch_version, has_gpu)
    has_mpi4py = _diagnose_mpi(problems)
    works: list[str] = []
    if megabytes is not None:
        works = _diagnose_launchers(problems, megabytes, has_horovod, has_mpi4py)
    if not works and not (megabytes is None and (has_horovod or has_mpi4py)):
        what = "no launcher could run 2 ranks" if has_horovod or has_mpi4py else "no MPI or Horovod"
        problems.append(
            Problem(what, "fix the problems above; one process still trains", fatal=True)
        )
    print()
    for problem in problems:
        print(f"{'ERROR' if problem.fatal else 'warning'}: {problem.what}: {problem.mend}")
    fatal = any(problem.fatal for problem in problems)
    if fatal:
        verdict = "training over several ranks does not work"
    else:
        verdict = f"ready to train with {works[0]}" if works else "no fault found; no ranks started"
    print(f"verdict: {verdict}")
    return 1 if fatal else 0


def _row(name: str, value: str) -> None:
    print(f"{name:<27}  {value}", flush=True)


def _ask(program: str) -> tuple[str | None, str]:
    """Run a short program in a fresh Python; return its last line or None, and its error.

    A library of the wrong build may crash the process that imports it.
    """
    result = subprocess.run(
        this_python("-W", "ignore", "-c", program),
        env=launcher_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return result.stdout.strip().splitlines()[-1], ""
    lines = result.stderr.strip().splitlines()
    return None, lines[-1] if lines else f"ended with code {result.returncode}"


def _diagnose_shared_memory(problems: list[Problem], config: str, ranks: int, needed: int) -> None:
    """Compare the free space in /dev/shm, which holds workers' batches, with the need."""
    who = f"{config} on {ranks} rank{'s' if ranks > 1 else ''}"
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    _row("shared memory", f"{free / 1e6:,.0f} MB free in /dev/shm; {who}: {needed / 1e6:,.0f} MB")
    if free < needed:
        what = f"{who} needs {needed / 1e6:,.0f} MB of /dev/shm, {free / 1e6:,.0f} are free"
        mend = (
            f"docker run --shm-size={-(-needed // 10**9)}g (or --ipc=host), a memory-backed "
            f"emptyDir at /dev/shm in Kubernetes, or fewer data.workers"
        )
        problems.append(Problem(what, mend))


def _diagnose_torch(problems: list[Problem]) -> tuple[str, bool]:
    """Report torch; return its version and whether it sees a GPU."""
    answer, why = _ask(_TORCH_FACTS)
    if answer is None:
        _row("torch", f"does not import: {why}")
        problems.append(Problem("torch does not import", "pip install torch", fatal=True))
        return "", False
    version, cuda, nccl, gpus = json.loads(answer)
    _row("torch", f"{version}, built for CUDA {cuda or 'none'}; NCCL loaded: {nccl or 'none'}")
    _row("GPUs", ", ".join(gpus) if gpus else "none visible")
    return version, bool(gpus)


def _diagnose_horovod(problems: list[Problem], torch_version: str, has_gpu: bool) -> bool:
    """Report Horovod; return whether it imports."""
    if importlib.util.find_spec("horovod") is None:
        _row("horovod", "not installed")
        problems.append(Problem("Horovod is not installed", BUILD))
        return False
    answer, why = _ask(_HOROVOD_FACTS)
    if answer is None:
        _row("horovod", f"does not import: {why}")
        problems.append(Problem("Horovod was built for another torch or MPI", BUILD))
        return False
    version, mpi, gloo, nccl, built_from = json.loads(answer)
    built = {"MPI": mpi, "Gloo": gloo, f"NCCL {_nccl_name(nccl)}".strip(): nccl}
    _row("horovod", ", ".join([version] + [f"{'' if v else 'no '}{k}" for k, v in built.items()]))
    if built_from is not None:
        wanted = built_from["torch"]["version"]
        _row("  built for", f"torch {wanted}, {built_from['mpi']}"[:100])
        if wanted != torch_version:
            what = f"Horovod was built for torch {wanted}, {torch_version} is installed"
            problems.append(Problem(what, BUILD))
    if has_gpu and not nccl:
        what = "this machine has GPUs but Horovod is built without NCCL"
        problems.append(Problem(what, f"install the CUDA toolkit (nvcc), then {BUILD}"))
    return True


def _nccl_name(code: int) -> str:
    """Return 2.28.9 for ``22809``, and an empty string for 0."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}" if code else ""


def _diagnose_mpi(problems: list[Problem]) -> bool:
    """Report mpirun, mpi4py and whether their MPI is the same; return if mpi4py imports."""
    mpirun = mpirun_version()
    _row("mpirun", f"{mpirun} ({find_program('mpirun')})" if mpirun else "not found")
    if importlib.util.find_spec("mpi4py") is None:
        _row("mpi4py", "not installed")
        return False
    answer, why = _ask(_MPI_FACTS)
    _row("mpi4py", answer or f"does not import: {why}")
    if answer is None:
        mend = "pip install --no-cache-dir --no-binary mpi4py mpi4py, with the site's mpicc on PATH"
        problems.append(Problem("mpi4py finds no MPI library that it supports", mend))
        return False
    if mpirun and ("Open MPI" in mpirun) != ("Open MPI" in answer):
        what = f"mpirun is {mpirun}, but mpi4py uses another MPI"
        problems.append(Problem(what, "put one MPI first on PATH and run the set-up again"))
    return True


def _diagnose_launchers(
    problems: list[Problem], megabytes: int, has_horovod: bool, has_mpi4py: bool
) -> list[str]:
    """Run a 2-rank all-reduce per launcher and backend; return the names of those that work."""
    cases = [(launcher, "horovod") for launcher in LAUNCHERS if has_horovod]
    cases += [("mpirun", "mpi")] if has_mpi4py else []
    works: list[str] = []
    for launcher, backend in cases:
        name = f"{launcher}, {backend}"
        if find_program(launcher.split()[0]) is None:
            _row(name, f"{launcher.split()[0]} not found")
            continue
        program = this_python("-W", "ignore", "-m", "hvd_lars.cli.doctor", backend, str(megabytes))
        result = run_here(launcher, 2, program, timeout=120)
        # Do not match the line's end: Open MPI 4 appends the tag of the next line.
        found = re.search(r"ALL-REDUCE (.* GiB/s)", result.stdout)
        if result.returncode == 0 and found:
            works.append(name)
            _row(name, found.group(1))
        else:
            text = [line.strip() for line in result.stdout.splitlines() if line.strip()]
            said = next((line for line in text if "hvd-lars:" in line), text[-1] if text else "")
            why = "hung, ended after 120 s" if result.returncode == 124 else said
            _row(name, f"FAILED: {why}")
            problems.append(Problem(f"{name} does not work", "see its line above"))
    return works


def _probe(backend: str, megabytes: int) -> None:
    """Sum a tensor over the test ranks, check the sum and print the median time."""
    import torch

    from hvd_lars.comm import connect

    try:
        comm = connect(backend, expect_world_size=2)
    except UserError as error:
        print(f"hvd-lars: {error}", flush=True)
        os._exit(2)
    torch.set_num_threads(1)
    tensor = torch.zeros(megabytes * 2**18)
    seconds = []
    for _ in range(5):
        tensor.fill_(comm.rank + 1)
        comm.barrier()
        started = time.perf_counter()
        comm.start_all_reduce_sum(tensor, "doctor").wait()
        seconds.append(time.perf_counter() - started)
    if not bool((tensor == 3).all()):
        comm.abort("the sum of 1 and 2 over two ranks is not 3")
    median = sorted(seconds)[2]
    if comm.rank == 0:
        rate = megabytes / 1024 / median
        print(f"ALL-REDUCE {megabytes} MiB in {median * 1e3:.0f} ms, {rate:.2f} GiB/s", flush=True)
    comm.close()


if __name__ == "__main__":
    _probe(sys.argv[1], int(sys.argv[2]))
