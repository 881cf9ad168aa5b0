"""Data set settings, one file per kind: a section of the YAML whose ``build()`` makes the source.

To add a kind, write its file, list its settings in the file's ``KINDS``, and name the file in
``_FILES``.  Torch is loaded by ``build`` only.
"""

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING

from hvd_lars.sources.settings import BuildContext, SourceSettings

_FILES = (
    "digits",
    "glyphs",
    "synthetic",
    "auto",
    "image_folder",
    "shards",
    "imagenet",
    "tfrecord",
    "arrow",
    "recordio",
    "zip",
    "cifar",
    "idx",
    "python",
)
KINDS: tuple[type[SourceSettings], ...] = tuple(
    kind for file in _FILES for kind in import_module(f"{__name__}.{file}").KINDS
)
if TYPE_CHECKING:
    Data = SourceSettings
else:
    Data = reduce(or_, KINDS)

__all__ = ["KINDS", "BuildContext", "Data", "SourceSettings"]
