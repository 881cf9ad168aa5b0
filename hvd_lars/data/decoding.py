"""Image files, decoded only once the required size is known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.data.region import Part, decode_region
from hvd_lars.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Pixels = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags

_END_OF_IMAGE, _TRAILER = b"\xff\xd9", 1024  # bytes that may follow the end
_SHRINKS = (8, 4, 2)  # JPEG decoders do these with fewer frequencies, without resizing


@final
class Picture:
    """One image; a JPEG is decoded only in :meth:`pixels`, at the size requested there.

    Args:
        data: the bytes of an image file in any format that Pillow reads, or pixels uint8: an array
            (height, width, 3), or a tensor (3, height, width) on any device.  Grey images of more
            than 8 bits are scaled to 8; EXIF orientation is not applied, as in torchvision.
        name: used in error messages.

    Attributes:
        height, width: stored size in pixels.
        jpeg: the file, if it is a JPEG of a usual kind; otherwise empty.

    Raises:
        UserError: not an image, or larger than Pillow allows.
    """

    def __init__(self, data: bytes | Pixels | Tensor, name: str):
        self._name, self.jpeg = name, b""
        if isinstance(data, bytes):
            size = _jpeg_size(data)
            if size is not None:
                self.jpeg = data
                self.height, self.width = size
                return
            data = _any_format(data, name)
        self._pixels = data if isinstance(data, Tensor) else torch.from_numpy(data).permute(2, 0, 1)
        self.height, self.width = self._pixels.shape[1:]

    def shrink_for(self, height: int, width: int, side: int) -> int:
        """Return the factor by which decoding may shrink a height × width part for side × side."""
        if self.jpeg:
            for shrink in _SHRINKS:
                if min(height, width) >= shrink * side:
                    return shrink
        return 1

    def pixels(self, shrink: int = 1, exact: bool = True) -> Tensor:
        """Return RGB (3, ⌈height / shrink⌉, ⌈width / shrink⌉) uint8, stored as (height, width, 3).

        ``shrink`` is a result of :meth:`shrink_for`.  Unless ``exact``, the inverse DCT is faster
        and subsampled chroma is not interpolated.

        Raises:
            UserError: the image is damaged.
        """
        if not self.jpeg:
            return self._pixels
        import simplejpeg

        least = -(-self.height // shrink), -(-self.width // shrink)
        try:
            array = simplejpeg.decode_jpeg(
                self.jpeg,
                fastdct=not exact,
                fastupsample=not exact,
                min_height=least[0],
                min_width=least[1],
            )
        except ValueError:  # Pillow may read an unusual kind; if not, it reports the damage
            array = _any_format(self.jpeg, self._name)
            return torch.from_numpy(array).permute(2, 0, 1)[:, ::shrink, ::shrink]
        return torch.from_numpy(array).permute(2, 0, 1)

    def part(self, shrink: int, part: Part) -> Tensor:
        """Return a part of :meth:`pixels`, not exact; only that part is decoded if possible.

        Args:
            shrink: a result of :meth:`shrink_for`.
            part: in pixels of the smaller image.

        Raises:
            UserError: the image is damaged; damage below the part may go unnoticed.
        """
        # In a file without its end, the missing rows may be below the part in one epoch and not
        # in another: it is decoded as a whole, which fails.
        if self.jpeg and self.jpeg.rfind(_END_OF_IMAGE, max(0, len(self.jpeg) - _TRAILER)) >= 0:
            found = decode_region(self.jpeg, shrink, part)
            if found is not None:
                return found.permute(2, 0, 1)
        top, left, height, width = part
        whole = self.pixels(shrink, exact=False)
        return whole[:, top : top + height, left : left + width]


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG of a usual kind and size, else None."""
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


def _any_format(data: bytes, name: str) -> Pixels:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, which is not used
            with pil.open(BytesIO(data)) as file:
                if file.mode[0] in "IF":  # Pillow's own conversion would clip at 255
                    grey = to_bytes(np.asarray(file), *_range_of(file))
                    return np.repeat(grey[..., None], 3, axis=2)
                return np.array(file.convert("RGB"))
    except Exception as error:  # Pillow raises anything on a damaged file
        # Pillow would name the buffer in memory; the line already names the file.
        unknown = isinstance(error, UnidentifiedImageError)
        said = " ".join(str(error).split()) or type(error).__name__
        problem = "of no known format" if unknown else said
        raise UserError(f"{name}: not a readable image: {problem}") from None


def _range_of(file: PillowImage) -> tuple[float, bool]:
    """Return the value of white, and whether 0 is white instead of black."""
    if file.mode.startswith("F"):
        return 1.0, False
    tags: Mapping[int, Any] = getattr(file, "tag_v2", {})
    if not tags:  # Pillow scales PNG, PGM and others to 16 bits
        return 65535.0, False
    bits = int(tags.get(_BITS, (16,))[0])
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    return float(2 ** (bits - signed) - 1), tags.get(_PHOTOMETRIC) == 0


def to_bytes(
    grey: np.ndarray[Any, Any], white: float, inverted: bool = False
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale grey values from 0 to ``white`` to 0 to 255, rounded.

    Raises:
        ValueError: values are outside that range; or 32-bit values are so small that 8 bits would
            lose them all, such as 16-bit values stored in 32 bits: white is then unknown.
    """
    if white > 2**31:
        grey = grey.astype(np.int32, copy=False).view(np.uint32)  # Pillow has no unsigned mode
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0.0 and high <= white):  # nor NaN
        raise ValueError(f"grey values from {low:g} to {high:g}; allowed: 0 to {white:g}")
    if 0.0 < high < white / 255.0 and white > 65535.0:
        raise ValueError(
            f"grey values up to {high:g}, where white is {white:g}: their scale is unknown; "
            f"store them as 8 or 16 bits"
        )
    scaled = np.rint(grey * (255.0 / white)).astype(np.uint8)
    return 255 - scaled if inverted else scaled
