"""Image files of every kind as pixels: the right values, or refused by name."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from hvd_lars.data.decoding import Picture, to_bytes
from hvd_lars.errors import UserError

GREY = np.linspace(0, 65535, 64 * 48).reshape(48, 64)  # from black to white
WANTED = np.rint(GREY / 257)


def encoded(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def tiff(array, bits, sample_format=1, photometric=1, order="<"):
    """An uncompressed grey TIFF; sample_format 1 is unsigned, 2 signed, 3 floating-point."""
    height, width = array.shape
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)
            ]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    entries = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        entries += struct.pack(f"{order}HHI", tag, kind, 1)
        short = struct.pack(f"{order}HH", value, 0) if kind == 3 else b""
        entries += short or struct.pack(f"{order}I", value)
    return head + data + entries + bytes(4)


SIXTEEN = GREY.round().astype(np.uint16)
RIGHT = {
    "16-bit PNG": encoded(SIXTEEN, "PNG"),
    "16-bit PGM": encoded(SIXTEEN, "PPM"),
    "16-bit TIFF": tiff(SIXTEEN, 16),
    "16-bit TIFF, Motorola": tiff(SIXTEEN, 16, order=">"),
    "16-bit TIFF, 0 is white": tiff(65535 - SIXTEEN, 16, photometric=0),
    "16-bit TIFF, signed": tiff((GREY / 65535 * 32767).astype(np.int16), 16, 2),
    "16-bit JPEG 2000": encoded(SIXTEEN, "JPEG2000"),
    "32-bit TIFF": tiff((GREY * 65537).astype(np.uint32), 32),
    "32-bit TIFF, signed": tiff((GREY / 65535 * (2**31 - 1)).astype(np.int32), 32, 2),
    "float TIFF": tiff((GREY / 65535).astype(np.float32), 32, 3),
    "float PFM": encoded((GREY / 65535).astype(np.float32), "PPM"),
    "8-bit PNG": encoded(WANTED.astype(np.uint8), "PNG"),
    "8-bit palette": encoded(WANTED.astype(np.uint8), "GIF"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_grey_of_any_depth_keeps_its_brightness(kind):
    """Pillow's conversion to RGB turns 16 bits white and floats black."""
    pixels = Picture(RIGHT[kind], "x").pixels().numpy()
    assert pixels.shape == (3, 48, 64)
    assert (pixels == pixels[0]).all()
    assert np.abs(pixels[0].astype(float) - WANTED).max() <= 1
    assert pixels.mean() == pytest.approx(127.5, abs=0.6)


REFUSED = {
    "8 bits in 32": (tiff((GREY / 257).astype(np.uint32), 32), "grey values up to 255, where"),
    "16 bits in 32": (tiff(SIXTEEN.astype(np.int32), 32, 2), "up to 65535, where white is 2.147"),
    "float above 1": (tiff((GREY / 257).astype(np.float32), 32, 3), "from 0 to 255; allowed: 0 to"),
    "negative": (tiff((GREY - 9).astype(np.int16), 16, 2), "grey values from -"),
    "not a number": (tiff(np.full((4, 4), np.nan, np.float32), 32, 3), "from nan to nan; allowed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_grey_whose_white_is_not_known_is_refused_by_name(kind):
    data, message = REFUSED[kind]
    with pytest.raises(UserError) as caught:
        Picture(data, "folder/x.tif")
    assert str(caught.value).startswith("folder/x.tif: not a readable image: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_dark_image_of_16_bits_is_dark():
    assert set(to_bytes(np.array([[0, 100, 200, 300]], np.uint16), 65535.0)[0]) == {0, 1}


def test_black_is_black():
    assert not to_bytes(np.zeros((2, 2), np.uint16), 65535.0).any()
    assert to_bytes(np.zeros((2, 2), np.uint16), 65535.0, inverted=True).min() == 255


def test_exif_orientation_is_not_applied_as_in_torchvision():
    image, file = Image.new("RGB", (20, 10)), io.BytesIO()
    exif = image.getexif()
    exif[274] = 6  # turn by a quarter
    image.save(file, "JPEG", exif=exif)
    assert Picture(file.getvalue(), "x").pixels().shape == (3, 10, 20)
