"""End processes from a fork server with the process that requested them.

A worker's parent is the fork server, which lives as long as its workers: without this, both would
outlive a killed owner.
"""

from __future__ import annotations

import multiprocessing
import os
import threading


def leave_with_owner() -> None:
    """Make this worker exit, whatever it is doing, once its owner has gone."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    owner = multiprocessing.parent_process()  # the process that asked the fork server
    if owner is not None:
        owner.join()
        os._exit(1)
