"""Image files as pixels, decoded when it is known how large they need be; imports errors."""

from __future__ import annotations

from io import BytesIO
from typing import final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.errors import UserError

_SHRINKS = (8, 4, 2)  # what JPEG decoders do with fewer frequencies and no resizing


@final
class Picture:
    """One image, of which a JPEG is not decoded before :meth:`pixels` says at what size.

    Args:
        data: the bytes of an image file of any format that Pillow reads, or pixels
            (height, width, 3) uint8.
        name: what an error calls it.

    Attributes:
        height, width: in pixels, as it was stored.

    Raises:
        UserError: it is not an image, or of an absurd size.
    """

    def __init__(
        self, data: bytes | np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], name: str
    ):
        self._name, self._jpeg = name, b""
        if isinstance(data, bytes):
            size = _jpeg_size(data)
            if size is not None:
                self._jpeg = data
                self.height, self.width = size
                return
            data = _any_format(data, name)
        self._pixels = data
        self.height, self.width = data.shape[:2]

    def shrink_for(self, height: int, width: int, side: int) -> int:
        """How far a part of height × width may shrink in decoding to become side × side later."""
        if self._jpeg:
            for shrink in _SHRINKS:
                if min(height, width) >= shrink * side:
                    return shrink
        return 1

    def pixels(self, shrink: int = 1, exact: bool = True) -> Tensor:
        """RGB (3, ⌈height / shrink⌉, ⌈width / shrink⌉) uint8, in memory (height, width, 3).

        ``shrink`` is one that :meth:`shrink_for` gave.  Where it need not be ``exact``, colours of
        lower resolution are not interpolated, which is quicker.

        Raises:
            UserError: the image is damaged.
        """
        if not self._jpeg:
            array = self._pixels
        else:
            import simplejpeg

            least = -(-self.height // shrink), -(-self.width // shrink)
            try:
                array = simplejpeg.decode_jpeg(
                    self._jpeg,
                    fastdct=not exact,
                    fastupsample=not exact,
                    min_height=least[0],
                    min_width=least[1],
                )
            except (
                ValueError
            ):  # an unusual kind, which Pillow may know; or else it says what is wrong
                array = _any_format(self._jpeg, self._name)
                return torch.from_numpy(array).permute(2, 0, 1)[:, ::shrink, ::shrink]
        return torch.from_numpy(array).permute(2, 0, 1)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of a usual kind and size, else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    import simplejpeg
    from PIL import Image as pil

    try:
        height, width, kind, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if kind not in ("YCbCr", "Gray", "RGB") or height * width > (pil.MAX_IMAGE_PIXELS or 2**62):
        return None
    return height, width


def _any_format(data: bytes, name: str) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(BytesIO(data)) as file:
            return np.array(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        # Pillow names a buffer in memory, where the line names the file already.
        problem = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: not a readable image: {problem}") from None
