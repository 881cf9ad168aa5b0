"""A profile of some steps of a run.

torch's profiler and Horovod's timeline, both for chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, final

import torch
from torch.profiler import ProfilerActivity

from hvd_lars.comm.base import Communicator


@final
class Profile:
    """Writes ``steps-A-B/`` with a trace of every rank once training gets there.

    Args:
        first: the first profiled step, counted from 1.
        last: the last profiled step.
        folder: of ``steps-A-B/``, which holds ``torch-rank-R.json`` and ``horovod.json``.
        comm: the ranks.
    """

    def __init__(self, first: int, last: int, folder: Path, comm: Communicator) -> None:
        self._first, self._last, self._comm = first, last, comm
        self._folder = folder / f"steps-{first}-{last}"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Begin or finish the profile; called on every rank before each step."""
        if step == self._first:
            self._start()
        elif step > self._last:
            self.finish()

    def finish(self) -> None:
        """Write the profile; does nothing if none is in progress."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self._folder / f"torch-rank-{self._comm.rank}.json"))
        if self._has_timeline():
            _horovod().stop_timeline()

    def _start(self) -> None:
        if self._comm.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._comm.barrier()
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds)
        with warnings.catch_warnings():  # about keeping only one cycle: there is no other
            warnings.filterwarnings("ignore", ".*Profiler clears events.*")
            self._profiler.start()
        if self._has_timeline():
            _horovod().start_timeline(str(self._folder / "horovod.json"))

    def _has_timeline(self) -> bool:
        return self._comm.backend == "horovod" and os.environ.get("HOROVOD_TIMELINE") == "DYNAMIC"


def prepare_timeline() -> None:
    """Allow a timeline later; must be called before Horovod starts."""
    os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")


def _horovod() -> Any:
    import horovod.torch as hvd

    return hvd
