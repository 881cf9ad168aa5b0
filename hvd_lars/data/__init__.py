"""Images: sources, and which samples make up a global batch.

Imports errors only; rank and size come in as ints.
"""

from hvd_lars.data.digits import Digits
from hvd_lars.data.image_folder import ImageFolder
from hvd_lars.data.listing import list_folder
from hvd_lars.data.loader import Request, stream
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Source
from hvd_lars.data.synthetic import Synthetic

__all__ = [
    "Digits",
    "GlobalBatches",
    "ImageFolder",
    "Request",
    "Source",
    "Synthetic",
    "list_folder",
    "stream",
]
