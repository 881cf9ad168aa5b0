"""One file an optimizer: its section of the YAML, and ``build()``, which makes it.

To add one, write its file and add its settings to ``KINDS``.  Torch is imported by ``build``
alone.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from hvd_lars.optimizers.lars import LarsSettings
from hvd_lars.optimizers.settings import OptimizerSettings
from hvd_lars.optimizers.sgd import SgdSettings

KINDS: tuple[type[OptimizerSettings], ...] = (LarsSettings, SgdSettings)
if TYPE_CHECKING:
    Optimizer = OptimizerSettings
else:
    Optimizer = reduce(or_, KINDS)

__all__ = ["KINDS", "LarsSettings", "Optimizer", "OptimizerSettings"]
