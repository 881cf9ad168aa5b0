"""``hvd-lars train`` with workers that join and leave.

Horovod's driver (``horovodrun --min-np``) starts workers, detects lost ones and gives the others
new ranks.  Training is then rebuilt and resumes from the newest snapshot in any worker's memory.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping

from hvd_lars.cli.train import train
from hvd_lars.comm import Communicator, Launch, connect
from hvd_lars.config.schema import Config
from hvd_lars.health.stop_requests import StopRequests
from hvd_lars.state.snapshots import Snapshots


def is_elastic(environment: Mapping[str, str]) -> bool:
    """Return whether Horovod's elastic driver started this process."""
    return environment.get("HOROVOD_ELASTIC") == "1"


def train_elastic(
    options: argparse.Namespace,
    config: Config,
    guarded: Callable[[Communicator, Callable[[], int], tuple[type[BaseException], ...]], int],
) -> int:
    """Train; return the exit code.

    ``guarded`` runs one attempt and ends the job on any exception except those it is given, which
    mean that a rank was lost, or hosts were added or removed.
    """
    import horovod.torch as hvd
    from horovod.common.elastic import State
    from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

    class Changes(State):  # type: ignore[misc]
        """Changes of hosts; the state itself is in ``snapshots``."""

        def save(self) -> None: ...
        def restore(self) -> None: ...
        def sync(self) -> None: ...

    snapshots = Snapshots(StopRequests.within(config.run.max_hours))

    @hvd.elastic.run  # type: ignore[untyped-decorator]
    def attempt(changes: Changes) -> int:
        gc.collect()  # models of an earlier attempt
        # Even with one worker, as others may join.
        backend = "horovod" if config.comm.backend == "auto" else config.comm.backend
        comm = connect(backend, config.run.expect_world_size, groups=True)
        name = "horovodrun --host-discovery-script"
        place = (comm.rank, comm.size, comm.local_rank, hvd.local_size())
        launch = Launch(name, *place, mpi=False)

        def work() -> int:
            look = changes.check_host_updates
            return train(options, config, comm, launch, snapshots, after_snapshot=look)

        return guarded(comm, work, (HorovodInternalError, HostsUpdatedInterrupt))

    code: int = attempt(Changes(hvd.broadcast_object, hvd.rank))
    return code
