"""Smaller images for shards that are quicker to decode."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hvd_lars.data.crops import shorter_side
from hvd_lars.data.decoding import Picture
from hvd_lars.errors import UserError


@dataclass(frozen=True)
class Shrink:
    """Resize images to a shorter side and write them as JPEG; smaller ones are not changed.

    Attributes:
        side: shorter side, in pixels.
        quality: of the JPEG, 1 to 100.
    """

    side: int
    quality: int

    def __call__(self, data: bytes) -> bytes:
        """Return the smaller image file; the same bytes if it is no larger, or unreadable."""
        import simplejpeg

        try:
            picture = Picture(data, "image")
            if min(picture.height, picture.width) <= self.side:
                return data
            pixels = shorter_side(picture, self.side)
        except UserError:
            return data
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        return bytes(simplejpeg.encode_jpeg(array, self.quality, "RGB", "420", fastdct=False))

    def __str__(self) -> str:
        """Return a description for people."""
        return f"shorter side {self.side}, JPEG quality {self.quality}"

    def identity(self, sha256: str) -> str:
        """Return the hash of a split whose images are shrunk, from the one of the originals."""
        return hashlib.sha256(f"{sha256} {self}".encode()).hexdigest()
