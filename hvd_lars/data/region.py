"""Decode the part of a JPEG that a crop needs, with libjpeg-turbo.

region.cpp is compiled when hvd_lars is installed, if there is a compiler, and calls the library
that Pillow brings.  Without either, whole images are decoded.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Part = tuple[int, int, int, int]
"""Top, left, height and width of a part, in pixels."""


@functools.cache
def _load() -> ctypes.CDLL | None:
    found = sorted(Path(__file__).parent.glob("_region*.so"))
    libjpeg = _libjpeg()
    if not found or libjpeg is None:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        decode = library.hvd_lars_region_decode
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        decode.argtypes = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int, *[unsigned] * 4, pointer]
        if library.hvd_lars_region_load(libjpeg.encode()):
            return None
    except (OSError, AttributeError):
        return None
    return library if _works(library) else None


def _libjpeg() -> str | None:
    """Return the path of the libjpeg that Pillow has loaded."""
    import PIL._imaging  # noqa: F401

    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    match = re.search(r"/\S*pillow\.libs/libjpeg\b[^/\s]*", mapped, re.IGNORECASE)
    match = match or re.search(r"/\S*/libjpeg\.so\.62\b[^/\s]*", mapped)
    return match.group() if match else None


def _works(library: ctypes.CDLL) -> bool:
    """Return whether the library decodes as simplejpeg does: it may be of another version."""
    import simplejpeg

    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(pixels, 90, "RGB", "420")
    whole = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    part = _decode(library, data, 1, (17, 19, 20, 30))
    return part is not None and np.array_equal(part.numpy(), whole[17:37, 19:49])


def decode_region(data: bytes, shrink: int, part: Part) -> Tensor | None:
    """Return a part of a JPEG that is decoded at 1/``shrink`` of its size.

    Args:
        data: the file.
        shrink: 1, 2, 4 or 8.
        part: in pixels of the smaller image.

    Returns:
        RGB (height, width, 3) uint8: the pixels of the same part of the whole image, with the fast
        inverse DCT and without interpolated chroma; None if that cannot be done, such as for
        a file that is damaged above the part's end.
    """
    library = _load()
    return None if library is None else _decode(library, data, shrink, part)


def _decode(library: ctypes.CDLL, data: bytes, shrink: int, part: Part) -> Tensor | None:
    _, _, height, width = part
    out = torch.empty(height, width, 3, dtype=torch.uint8)
    failed = library.hvd_lars_region_decode(data, len(data), shrink, *part, out.data_ptr())
    return None if failed else out
