"""Images: sources, and which samples make up a global batch.

Imports errors only; rank and size come in as ints.
"""

from hvd_lars.data.digits import Digits
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Source
from hvd_lars.data.synthetic import Synthetic

__all__ = ["Digits", "GlobalBatches", "Source", "Synthetic"]
