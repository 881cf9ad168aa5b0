"""Image sources, and the samples of each global batch."""

from hvd_lars.data.augment import Augment
from hvd_lars.data.cifar import load_cifar
from hvd_lars.data.digits import load_digits
from hvd_lars.data.glyphs import draw_glyphs
from hvd_lars.data.image_folder import FolderImages
from hvd_lars.data.images import Images
from hvd_lars.data.listing import list_folder
from hvd_lars.data.loader import WorkerLostError, stream
from hvd_lars.data.located import LocatedImages
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.shards.cache import cached_root, copy_shards
from hvd_lars.data.shards.index import load_shards
from hvd_lars.data.source import Request, Source
from hvd_lars.data.synthetic import Synthetic

__all__ = [
    "Augment",
    "FolderImages",
    "GlobalBatches",
    "Images",
    "LocatedImages",
    "Request",
    "Source",
    "Synthetic",
    "WorkerLostError",
    "cached_root",
    "copy_shards",
    "draw_glyphs",
    "load_digits",
    "list_folder",
    "load_cifar",
    "load_shards",
    "stream",
]
