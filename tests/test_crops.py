"""Pictures decoded and cut as torchvision would, in less time."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from hvd_lars.data import region
from hvd_lars.data.augment import Augment
from hvd_lars.data.crops import NUM_DRAWS, centre_crop, random_part, training_crop
from hvd_lars.data.decoding import Picture
from hvd_lars.errors import UserError

EVERY = [0.0, *[0.999, 0.5, 0.0, 0.0] * 10]  # draws: mirrored, nearly the greatest area, top left


def photograph(width, height, mode="RGB", form="JPEG"):
    """A smooth picture as a file, and its pixels as Pillow decodes them."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, form)
    pixels = np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    return file.getvalue(), torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("1", "BMP")],
)
def test_pixels_are_those_that_pillow_decodes(mode, form):
    data, wanted = photograph(63, 41, mode, form)
    picture = Picture(data, "x")
    assert (picture.height, picture.width) == (41, 63)
    assert torch.equal(picture.pixels(), wanted)


def test_a_part_that_becomes_small_is_decoded_at_reduced_size():
    data, wanted = photograph(403, 301)
    picture = Picture(data, "x")
    sizes = [(300, 400, 38), (300, 400, 37), (300, 400, 151), (300, 400, 150), (9, 9, 16)]
    assert [picture.shrink_for(*size) for size in sizes] == [4, 8, 1, 2, 1]
    assert Picture(photograph(403, 301, form="PNG")[0], "x").shrink_for(300, 400, 10) == 1
    for shrink in (1, 2, 4, 8):
        found = picture.pixels(shrink, exact=False)
        assert found.shape == (3, -(-301 // shrink), -(-403 // shrink))
        exact = v2.functional.resize(wanted, list(found.shape[1:]), antialias=True)
        assert (found.float() - exact.float()).abs().mean() < 4.0  # of 255
    small = training_crop(Augment(crop_scale=(1.0, 1.0), flip=False), 32, 32)(picture, EVERY)
    top, left, height, width = random_part(EVERY, 301, 403, (1.0, 1.0))
    whole = wanted[:, top : top + height, left : left + width]
    exact = v2.functional.resize(whole, [32, 32], antialias=True)
    assert (small.float() - exact.float()).abs().mean() < 4.0


@pytest.mark.parametrize(
    "options",
    [{"subsampling": kind} for kind in range(3)]
    + [{"progressive": True}, {"restart_marker_rows": 1}, {"mode": "L"}],
)
def test_a_part_has_the_pixels_of_the_whole(options):  # fmt: skip
    """Wherever it begins in a block, at every reduced size, and only that part is decoded."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 17, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((171, 123), Image.Resampling.BICUBIC)
    options = dict(options)
    file = io.BytesIO()
    image.convert(options.pop("mode", "RGB")).save(file, "JPEG", quality=95, **options)
    picture = Picture(file.getvalue(), "x")
    for shrink in (1, 2, 4, 8):
        whole = picture.pixels(shrink, exact=False)
        rows, columns = whole.shape[1:]
        for _ in range(60):
            top, left = int(generator.integers(rows)), int(generator.integers(columns))
            height = int(generator.integers(1, rows - top + 1))
            width = int(generator.integers(1, columns - left + 1))
            wanted = whole[:, top : top + height, left : left + width]
            assert torch.equal(picture.part(shrink, (top, left, height, width)), wanted)
            found = region.decode_region(file.getvalue(), shrink, (top, left, height, width))
            assert torch.equal(found.permute(2, 0, 1), wanted)


def test_parts_without_the_library_are_the_same(monkeypatch):
    data, _ = photograph(403, 301)
    found = Picture(data, "x").part(2, (11, 13, 50, 70))
    monkeypatch.setattr(region, "_load", lambda: None)
    assert region.decode_region(data, 2, (11, 13, 50, 70)) is None
    assert torch.equal(Picture(data, "x").part(2, (11, 13, 50, 70)), found)


@pytest.mark.parametrize("top", [0, 200])
def test_an_image_without_its_end_is_unreadable_whatever_the_part(top):
    data, _ = photograph(403, 301)
    picture = Picture(data[: len(data) // 2], "cut.jpg")
    with pytest.raises(UserError, match=r"cut.jpg: not a readable image"):
        picture.part(1, (top, 0, 8, 8))
    assert region.decode_region(data[: len(data) // 2], 1, (290, 0, 8, 8)) is None
    assert region.decode_region(data, 1, (300, 0, 8, 8)) is None  # beyond the image
    assert region.decode_region(b"\xff\xd8nothing", 1, (0, 0, 8, 8)) is None


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (20, 300), (300, 20)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.5), (1.0, 1.0)])
def test_random_parts_are_distributed_as_torchvisions(height, width, scale):
    torch.manual_seed(0)
    count = 1500
    rows = np.random.default_rng(0).random((count, NUM_DRAWS)).tolist()
    ours = np.array([random_part(row, height, width, scale) for row in rows])
    image = torch.empty((1, height, width), device="meta")
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    )
    for part in (ours, theirs):
        assert (part >= 0).all()
        assert (part[:, 0] + part[:, 2] <= height).all()
        assert (part[:, 1] + part[:, 3] <= width).all()
    sides = np.array([height, width, height, width])
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 0.03 * sides).all()
    assert (np.abs(ours.std(0) - theirs.std(0)) < 0.03 * sides).all()


@pytest.mark.parametrize(("width", "height"), [(63, 41), (41, 63), (40, 40), (24, 31)])
def test_evaluation_is_torchvisions(width, height):
    data, wanted = photograph(width, height)
    theirs = v2.Compose([v2.Resize(24, antialias=True), v2.CenterCrop(16)])(wanted)
    assert torch.equal(centre_crop(16, 24)(Picture(data, "x")), theirs)


@pytest.mark.parametrize("size", [(63, 41), (8, 9), (16, 40)])
def test_windows_lie_inside_and_reach_every_corner(size):
    picture = Picture(photograph(*size)[0], "x")
    for kind in ("window", "padded"):
        cut = training_crop(Augment(crop=kind, flip=False), 16, 20)
        for place in (0.0, 1 - 2**-53):
            image = cut(picture, [0.0] + [place] * (NUM_DRAWS - 1))
            assert image.shape == (3, 16, 16)
    whole = v2.functional.pad(Picture(photograph(16, 16)[0], "x").pixels(), [4, 4, 4, 4])
    cut = training_crop(Augment(crop="padded", flip=False), 16, 16)
    draws = [0.0] + [1 - 2**-53] * (NUM_DRAWS - 1)
    assert torch.equal(cut(Picture(photograph(16, 16)[0], "x"), draws), whole[:, 8:, 8:])


def test_half_of_the_images_are_mirrored():
    picture = Picture(photograph(16, 16)[0], "x")
    cut = training_crop(Augment(crop="window"), 16, 16)
    left, right = (cut(picture, [first] + [0.0] * (NUM_DRAWS - 1)) for first in (0.49, 0.5))
    assert torch.equal(left.flip(-1), right)
    assert not torch.equal(left, right)


def test_damage_is_named_once_and_told_as_pillow_does():
    data, _ = photograph(63, 41)
    with pytest.raises(UserError, match="^a.jpg: not a readable image: .*[Tt]runcated"):
        Picture(data[: len(data) // 2], "a.jpg").pixels()
    with pytest.raises(UserError, match="^a.jpg: not a readable image: of no known format$"):
        Picture(b"\xff\xd8 no picture", "a.jpg")
