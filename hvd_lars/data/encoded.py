"""Batches of image files, to be decoded on the device that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hvd_lars.data.decoding import Picture


@final
@dataclass(frozen=True)
class Encoded:
    """Images of one batch, as files.

    Attributes:
        data: (bytes,) uint8: JPEG files, one after the other; pixels (height, width, 3) in place of
            a file of another format.
        sizes: (n, 3) int64: bytes of each, and height and width of pixels; 0, 0 for a JPEG.
    """

    data: Tensor
    sizes: Tensor

    def pin_memory(self) -> Encoded:
        """Return itself: decoders read from any memory; called by DataLoader."""
        return self


def encode(pictures: Sequence[Picture]) -> Encoded:
    """Return the files of ``pictures``, undecoded where they are JPEG."""
    parts, sizes = [], []
    for picture in pictures:
        if picture.jpeg:
            parts.append(torch.frombuffer(bytearray(picture.jpeg), dtype=torch.uint8))
            sizes.append((len(picture.jpeg), 0, 0))
        else:
            parts.append(picture.pixels().permute(1, 2, 0).reshape(-1))
            sizes.append((len(parts[-1]), picture.height, picture.width))
    return Encoded(torch.cat(parts), torch.tensor(sizes))


def decode(encoded: Encoded, device: torch.device) -> list[Picture | None]:
    """Decode on ``device``, with nvJPEG on a GPU; None for a damaged file.

    Pixels differ from the CPU's in their last bits: decoders interpolate chroma and round in
    different ways.  Where an image is to become much smaller, they differ more: a CPU may decode
    at 1/2, 1/4 or 1/8 of the size.
    """
    files = torch.split(encoded.data, encoded.sizes[:, 0].tolist())
    shapes = encoded.sizes[:, 1:].tolist()
    jpegs = [file for file, (height, _) in zip(files, shapes, strict=True) if not height]
    decoded = iter(_decode_jpegs(jpegs, device))
    found: list[Picture | None] = []
    for file, (height, width) in zip(files, shapes, strict=True):
        if height:
            pixels: Tensor | None = file.view(height, width, 3).permute(2, 0, 1).to(device)
        else:
            pixels = next(decoded)
        found.append(None if pixels is None else Picture(pixels, ""))
    return found


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode RGB (3, height, width) each."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if not files:
        return []
    try:
        return list(decode_jpeg(files, ImageReadMode.RGB, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error):  # the device's, not a file's
            raise
        if len(files) == 1:
            return [None]
    # One of them is damaged, and the message does not say which.
    return [image for file in files for image in _decode_jpegs([file], device)]


def why_not_on(device: torch.device) -> str:
    """Return why JPEG files cannot be decoded on ``device``, in a few words; "" if they can."""
    import numpy as np
    import simplejpeg

    grey = np.full((16, 16, 3), 128, np.uint8)
    file = torch.frombuffer(bytearray(simplejpeg.encode_jpeg(grey)), dtype=torch.uint8)
    try:
        from torchvision.io import decode_jpeg

        off = (decode_jpeg([file], device=device)[0].int() - 128).abs().max()
    except (RuntimeError, ImportError) as error:
        return " ".join(str(error).split())
    return "" if int(off) <= 2 else f"a grey image came out wrong by {int(off)} of 255"
