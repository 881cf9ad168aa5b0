"""The LARS optimizer and where its blocks live; imports comm.base only."""

from hvd_lars.optim.groups import parameter_groups
from hvd_lars.optim.lars import LARS
from hvd_lars.optim.placement import Placement
from hvd_lars.optim.replicated import Replicated
from hvd_lars.optim.sharded import Sharded

__all__ = ["LARS", "Placement", "Replicated", "Sharded", "parameter_groups"]
