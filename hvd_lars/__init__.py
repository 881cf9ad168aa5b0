"""hvd_lars: large-batch training of image classifiers with LARS over Horovod and MPI.

``LARS`` and ``parameter_groups`` work on their own in any PyTorch program; ``connect``, the
placements and ``watching`` extend them over ranks.  The command ``hvd-lars`` is the trainer.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["LAMB", "LARS", "Replicated", "Sharded", "connect", "parameter_groups", "watching"]

if TYPE_CHECKING:
    from hvd_lars.comm import connect
    from hvd_lars.health.watchdog import watching
    from hvd_lars.optim import LAMB, LARS, Replicated, Sharded, parameter_groups


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `hvd-lars check` of a mistyped config should not wait for it.
    if name == "connect":
        import hvd_lars.comm

        return hvd_lars.comm.connect
    if name == "watching":
        import hvd_lars.health.watchdog

        return hvd_lars.health.watchdog.watching
    if name in __all__:
        import hvd_lars.optim

        return getattr(hvd_lars.optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
