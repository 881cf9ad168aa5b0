"""Processes that come from a fork server end with who asked for them.

A worker's parent is the fork server, which lives as long as its workers do: left alone, both would
outlive a process that is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading


def leave_with_owner() -> None:
    """From here on, in a worker: leave, in whatever it does, once its owner has gone."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    owner = multiprocessing.parent_process()  # who asked the fork server
    if owner is not None:
        owner.join()
        os._exit(1)
