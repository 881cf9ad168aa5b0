"""Which file names are of images, and which are of nobody's making."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

# What systems leave in folders of images: macOS's archives, Synology's thumbnails, file systems'
# own folders, Windows' thumbnails and trash.  Names that begin with a dot are left out with them.
_LITTER = frozenset(
    {
        "__macosx", "@eadir", "#recycle", "lost+found", "$recycle.bin",
        "system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
    }
)  # fmt: skip

# Formats that Pillow lists and that are no images to it, or that run a program (Ghostscript).
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
_HIDDEN = "hidden"


def is_litter(name: str) -> bool:
    """Whether a file or folder is the system's, or hidden: no class and no image of the user."""
    return name.startswith(".") or name.lower() in _LITTER


def ending_of(name: str) -> str:
    """From the last dot on, in lower case; empty where there is none."""
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


@cache
def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow reads, in lower case with their dot."""
    from PIL import Image

    Image.init()
    endings = Image.registered_extensions().items()
    return frozenset(e for e, kind in endings if kind in Image.OPEN and kind not in _NOT_READ)


def count_left_out(counts: Counter[str], name: str, where: str = "") -> None:
    """Count a file under what :func:`describe_left_out` calls it."""
    kind = _HIDDEN if is_litter(name) else ending_of(name) or "without an ending"
    counts[f"{kind}{where and ' '}{where}"] += 1


def describe_left_out(counts: Mapping[str, int]) -> str:
    """One line, such as ``3 .txt, 1 hidden``; empty where nothing was left out."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)
