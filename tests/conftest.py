"""Ranks for tests: ``@pytest.mark.ranks(2, 3)`` tests run where pytest itself is what is launched.

Plain ``pytest`` runs everything: tests/launch/test_rank_suites.py starts the launchers, with as
many ranks as tests/sessions.py says.  To run some by hand:

    HVD_LARS_TEST_BACKEND=horovod mpirun -np 3 python -m pytest tests/contract
"""

import itertools
import os
import shutil
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads would spin

import pytest
import torch
from parts import PARTS, lines
from sessions import SESSIONS, sizes_of

from hvd_lars.comm import connect, detect_launch
from hvd_lars.optim import device_step
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.kernels.gpu import GpuKernel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
BACKEND = os.environ.get("HVD_LARS_TEST_BACKEND")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if BACKEND:
        # pytest tidies its shared folder up at exit, which ranks would do at once.
        config.option.basetemp = tempfile.mkdtemp(prefix="hvd_lars-ranks-")


def pytest_unconfigure(config):
    if BACKEND:
        shutil.rmtree(config.option.basetemp, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    launch = detect_launch(os.environ)
    kept, dropped = [], []
    for item in items:
        mark = item.get_closest_marker("ranks")
        sizes = sizes_of(mark) if mark else {}
        for kind, wanted in sizes.items():
            if not wanted <= set(SESSIONS[kind]):
                raise pytest.UsageError(f"{item.nodeid}: no session of {kind} has {wanted} ranks")
        if BACKEND:
            kind = "gloo" if launch.launcher == "horovodrun --gloo" else BACKEND
            taken = launch.size in sizes.get(kind, ())
        else:
            taken = mark is None
        (kept if taken else dropped).append(item)
        parts = [name for each in item.iter_markers("part") for name in each.args]
        for name in [*parts, *(["GPU"] if item.get_closest_marker("gpu") else [])]:
            item.user_properties.append(("part", name))
            if (missing := PARTS[name].missing()) is not None:
                item.add_marker(pytest.mark.skip(reason=f"{name}: {missing}"))
    # The longest first: their ranks poll, and are quickest beside what runs in one process, which
    # is the other half of the tests.
    kept.sort(key=lambda item: item.path.name != "test_rank_suites.py")
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter):
    """Count the real parts that ran, so that nobody takes a skipped one for a tested one."""
    counts = {}
    for report in itertools.chain(*terminalreporter.stats.values()):
        if not isinstance(report, pytest.TestReport):  # what was left out, and warnings
            continue
        ran = report.when == "call" and not report.skipped
        for key, name in getattr(report, "user_properties", ()):
            if key == "part":
                kept = counts.setdefault(name, [0, 0])
                kept[0] += ran
                kept[1] += report.skipped
    if counts:
        terminalreporter.section("real parts")
        for line in lines(counts):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def comm():
    """The communicator of the backend under test, joined once."""
    torch.set_num_threads(1)
    communicator = connect(BACKEND, groups=True, parts=True)
    yield communicator
    communicator.close()


@pytest.fixture
def take_kernel(monkeypatch):
    """A function from a name to LARS's ``kernel``, which makes CPU tensors take that kernel.

    Beside the kernels of the CPU there are "elsewhere", plain torch as on another device, and
    "gpu", Triton's kernels in its interpreter.
    """

    def take(name):
        if name == "elsewhere":
            kernel = EagerKernel(on_host=False)
        elif name == "gpu":
            if torch.cuda.is_available():
                pytest.skip("the interpreter is for machines without a GPU")
            kernel = GpuKernel()
        else:
            return name
        monkeypatch.setattr(device_step, "choose_kernel", lambda *_: kernel)
        return "auto"

    return take


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if BACKEND and report.failed:
        # The other ranks wait for this one inside a collective: say why and end the job.
        print(f"\nFAILED on rank {detect_launch(os.environ).rank}: {item.nodeid}", file=sys.stderr)
        print(report.longreprtext, file=sys.stderr, flush=True)
        os._exit(1)
    return report
