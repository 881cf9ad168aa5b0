"""One file a kind of data set: its section of the YAML, and ``build()``, which makes the source.

To add a kind, write its file and add its settings to ``KINDS``.  Torch is imported by ``build``
alone.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from hvd_lars.sources.cifar import Cifar10Data, Cifar100Data
from hvd_lars.sources.digits import DigitsData
from hvd_lars.sources.glyphs import GlyphsData
from hvd_lars.sources.image_folder import ImageFolderData
from hvd_lars.sources.settings import BuildContext, SourceSettings
from hvd_lars.sources.shards import ShardsData
from hvd_lars.sources.synthetic import SyntheticData

KINDS: tuple[type[SourceSettings], ...] = (
    DigitsData,
    GlyphsData,
    SyntheticData,
    ImageFolderData,
    ShardsData,
    Cifar10Data,
    Cifar100Data,
)
if TYPE_CHECKING:
    Data = SourceSettings
else:
    Data = reduce(or_, KINDS)

__all__ = ["KINDS", "BuildContext", "Data", "SourceSettings"]
