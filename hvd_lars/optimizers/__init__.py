"""Optimizer settings, one file per kind: a section of the YAML whose ``build()`` makes it.

To add a kind, write its file, list its settings in the file's ``KINDS``, and name the file in
``_FILES``.  Torch is loaded by ``build`` only.
"""

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING

from hvd_lars.optimizers.lars import LarsSettings
from hvd_lars.optimizers.settings import OptimizerSettings

_FILES = ("lars", "sgd", "lamb")
KINDS: tuple[type[OptimizerSettings], ...] = tuple(
    kind for file in _FILES for kind in import_module(f"{__name__}.{file}").KINDS
)
if TYPE_CHECKING:
    Optimizer = OptimizerSettings
else:
    Optimizer = reduce(or_, KINDS)

__all__ = ["KINDS", "LarsSettings", "Optimizer", "OptimizerSettings"]
