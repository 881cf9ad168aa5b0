#!/usr/bin/env python3
"""Everything that is to be known about a GPU, measured by one command in under 9 minutes.

    bash benchmarks/gpu_kit.sh kit                 # where there is a network
    python benchmarks/gpu.py --kit kit             # on the machine with the GPU

The machine needs Python, torch with CUDA, torchvision, mpi4py, a compiler and nvcc, but no network:
the rest comes from the kit's folder; without --kit, this Python's own packages are used.  Horovod
is built with NCCL beside the parts that do not need it.  Every part has its own time limit, prints
as it goes, and leaves the others standing if it fails.  The Markdown is printed and kept in
``benchmarks/results/gpu-NAME.md``.  Without a GPU the parts that a CPU can do are run, and nothing
is kept.  Imports the standard library alone: it installs what it needs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOROVOD_LIMIT = 420


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
PARTS = [
    Part(
        "tests",
        "Tests that need a GPU",
        120,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu_kernels.py"],
    ),
    Part(
        "step",
        "One optimizer step",
        90,
        ["benchmarks/lars_step.py", "--device", "cuda", "--rounds", "30"],
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
    Part("memory", "Memory against the estimate of `check`", 60, [TRAINING, "memory"], None),
    Part("decode", "JPEG decoding", 60, [TRAINING, "decode"], [TRAINING, "decode", "--steps", "1"]),
    Part(
        "accuracy",
        "Accuracy of the digits, on the GPU and on the CPU",
        90,
        [TRAINING, "accuracy"],
        None,
    ),
    Part(
        "ranks",
        "Several ranks on one GPU",
        60,
        [TRAINING, "ranks"],
        None,
    ),
    Part("horovod", "Horovod's example", 60, [TRAINING, "horovod"], None, needs_horovod=True),
    Part("nccl", "NCCL all-reduce of one rank", 60, [TRAINING, "nccl"], None, needs_horovod=True),
    Part(
        "doctor",
        "`hvd-lars doctor`",
        60,
        ["-m", "hvd_lars", "doctor", "--megabytes", "16"],
        None,
        needs_horovod=True,
    ),
]  # fmt: skip


class Report:
    """What was printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, *lines: str) -> None:
        """Print and keep."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)


def environment(work: Path) -> dict[str, str]:
    """The environment of every part: packages from the kit come before the machine's own."""
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([str(work / "site/bin"), os.environ["PATH"]]),
        "XDG_CACHE_HOME": str(work / "cache"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
    }


def install(kit: Path, work: Path) -> str:
    """Install the kit's wheels into ``work/site``, and build the package's own libraries."""
    wheels = [str(path) for path in sorted(kit.glob("*.whl"))]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(work / "site"), *wheels], check=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=ROOT, env=environment(work), capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def start_horovod(kit: Path, work: Path) -> subprocess.Popen[str]:
    """Build Horovod from the kit's sdist, beside everything else."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(kit.resolve())}
    log = (work / "horovod.log").open("w")
    return subprocess.Popen(
        [sys.executable, "launch/build_horovod.py"],
        cwd=ROOT, env=environment(work) | offline, stdout=log, stderr=log, text=True,
    )  # fmt: skip


def finish_horovod(build: subprocess.Popen[str], work: Path) -> str:
    """Wait for the build and install the wheel; returns why there is none, or an empty string."""
    try:
        code = build.wait(HOROVOD_LIMIT)
    except subprocess.TimeoutExpired:
        build.kill()
        return f"not built within {HOROVOD_LIMIT} s"
    wheels = sorted((work / "cache/hvd_lars").rglob("horovod-*.whl"))
    if code or not wheels:
        return (work / "horovod.log").read_text().strip().splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(work / "site"), str(wheels[-1])], check=True)
    return ""


def run(part: Part, command: list[str], work: Path, report: Report) -> bool:
    """Run a part within its time, printing as it goes; returns whether it succeeded."""
    report.say("", f"## {part.title}", "", f"`python {' '.join(command)}`", "")
    started = time.monotonic()
    process = subprocess.Popen(
        ["timeout", "-k", "5", str(part.seconds), sys.executable, *command],
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
    took = f"{time.monotonic() - started:.0f} of {part.seconds} s"
    report.say("", f"{end.get(code, f'FAILED with code {code}')}, {took}")
    return code == 0


def gpu_name(work: Path) -> str:
    """The name of the GPU that torch finds, or an empty string."""
    program = "from torch import cuda; print(cuda.get_device_name() if cuda.is_available() else '')"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment(work), capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"torch does not import: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def main() -> None:
    """Run the parts; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, help="folder made by gpu_kit.sh")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    report, failed = Report(), []
    with tempfile.TemporaryDirectory(prefix="hvd_lars-gpu-") as name:
        work = Path(name)
        gpu = gpu_name(work)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        report.say(f"# {gpu or 'No GPU'}", "", f"{os.cpu_count()} cores, Python "
                   f"{sys.version.split()[0]}, commit {commit.stdout.strip() or 'unknown'}; "
                   f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`")  # fmt: skip
        if not gpu:
            report.say("", "There is no GPU here: only what a CPU can do is run, in a short form.")
        why, build = "", None
        if options.kit is not None:
            problem = install(options.kit, work)
            if problem:
                report.say("", f"The native libraries were not built: {problem}")
            build = start_horovod(options.kit, work)
        for part in (part for part in PARTS if part.name in options.parts):
            if part.needs_horovod and build is not None:
                why, build = finish_horovod(build, work), None
            command = part.command if gpu else part.on_cpu
            if command is None:
                report.say("", f"## {part.title}", "", "not run: it needs a GPU")
            elif part.needs_horovod and why:
                report.say("", f"## {part.title}", "", f"not run: Horovod: {why}")
                failed.append(part.name)
            elif not run(part, command, work, report):
                failed.append(part.name)
        if build is not None:
            build.kill()
    report.say("", f"failed: {', '.join(failed) or 'none'}")
    if gpu:
        short = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
        target = ROOT / f"benchmarks/results/gpu-{short}.md"
        target.write_text("\n".join(report.lines) + "\n")
        print(f"kept in {target}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
