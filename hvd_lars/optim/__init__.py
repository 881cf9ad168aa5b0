"""The LARS optimizer and its placements over ranks."""

from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.distributed.replicated import Replicated
from hvd_lars.optim.distributed.sharded import Sharded
from hvd_lars.optim.groups import parameter_groups
from hvd_lars.optim.lamb import LAMB
from hvd_lars.optim.lars import LARS

__all__ = ["LAMB", "LARS", "Placement", "Replicated", "Sharded", "parameter_groups"]
