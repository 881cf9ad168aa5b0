"""Sums over ranks: one protocol, three final classes, and the launcher's variables.

``connect`` picks the class; torch is imported with the first backend.
"""

from hvd_lars.comm.base import Communicator, Pending
from hvd_lars.comm.connect import connect
from hvd_lars.launchers.environment import Launch, detect_launch

__all__ = ["Communicator", "Launch", "Pending", "connect", "detect_launch"]
