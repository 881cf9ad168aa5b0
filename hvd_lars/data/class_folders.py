"""Images in class folders: ``root/train/CLASS/…/image``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hvd_lars.data.naming import (
    count_left_out,
    describe_left_out,
    ending_of,
    image_endings,
    is_litter,
)
from hvd_lars.errors import UserError


def class_folders(
    folder: Path, split: str, times: dict[bytes, int], left_out: Counter[str]
) -> list[str]:
    """Return the sorted names of a split's class folders."""
    try:
        times[os.fsencode(split)] = (folder / split).stat().st_mtime_ns
        with os.scandir(folder / split) as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise UserError(
            f"data.root: {folder / split}: {error.strerror}; expected a folder with one "
            f"folder of images per class"
        ) from None
    for name in (name for name, is_folder in found.items() if not is_folder):
        count_left_out(left_out, name, "beside the class folders")
    names = sorted(name for name, is_folder in found.items() if is_folder and not is_litter(name))
    if not names:
        raise UserError(
            f"data.root: {folder / split}: no class folders in it; needed: one folder a class, or "
            f"labels in data.val_list, LOC_val_solution.csv or val_annotations.txt"
        )
    return names


def images_in(
    folder: Path, top: str, times: dict[bytes, int], left_out: Counter[str], needed: bool
) -> list[bytes]:
    """Return the paths of a class's images below ``folder``, sorted by folder and name.

    Raises UserError if there are none but some are ``needed``.
    """
    endings = image_endings()
    paths: list[bytes] = []
    others: Counter[str] = Counter()
    for path, names in sorted(_walk(folder, top, times)):
        for name in sorted(names):
            if not is_litter(name) and ending_of(name) in endings:
                paths.append(os.fsencode(f"{path}/{name}"))
            else:
                count_left_out(others, name)
    if not paths and needed:
        found = f", only {describe_left_out(others)}" if others else ""
        raise UserError(f"data.root: {folder / top}: no images in it{found}")
    left_out.update(others)
    return paths


def _walk(folder: Path, top: str, times: dict[bytes, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield folders from ``folder / top`` down with their files' names; follows each link once."""
    above = [os.stat(path) for path in (folder / top).absolute().parents]
    seen = {(info.st_dev, info.st_ino) for info in above}
    waiting = [top]
    while waiting:
        path = waiting.pop()
        names = []
        try:
            here = os.stat(folder / path)
            if (here.st_dev, here.st_ino) in seen:  # a link to a folder above
                continue
            seen.add((here.st_dev, here.st_ino))
            times[os.fsencode(path)] = here.st_mtime_ns
            with os.scandir(folder / path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if not is_litter(entry.name):
                            waiting.append(f"{path}/{entry.name}")
                    # Reading a pipe would block; a broken link is reported when it is read.
                    elif entry.is_file() or not os.path.exists(entry.path):
                        names.append(entry.name)
        except OSError as error:
            raise UserError(f"data.root: {folder / path}: {error.strerror}") from None
        yield path, names
