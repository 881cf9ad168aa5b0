"""Recognise image files by name, and files that only the system left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

# Left in image folders by macOS's archives, Synology, file systems, and Windows' thumbnails and
# trash.  Names that begin with a dot are skipped as well.
_LITTER = frozenset(
    {
        "__macosx", "@eadir", "#recycle", "lost+found", "$recycle.bin",
        "system volume information", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini",
    }
)  # fmt: skip

# Formats that Pillow registers but cannot decode, or decodes with a program (Ghostscript).
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
_HIDDEN = "hidden"


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden or the system's: neither a class nor an image."""
    return name.startswith(".") or name.lower() in _LITTER


def shown(name: str) -> str:
    """Return the name on one line, whatever its characters."""
    return name if name.isprintable() else repr(name)


def ending_of(name: str) -> str:
    """Return the extension with its dot, in lower case; empty if there is none."""
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


@cache
def image_endings() -> frozenset[str]:
    """Return the extensions of the files that Pillow reads, in lower case with their dot."""
    from PIL import Image

    Image.init()
    endings = Image.registered_extensions().items()
    return frozenset(e for e, kind in endings if kind in Image.OPEN and kind not in _NOT_READ)


def count_left_out(counts: Counter[str], name: str, where: str = "") -> None:
    """Count a skipped file by its kind, for :func:`describe_left_out`."""
    kind = _HIDDEN if is_litter(name) else ending_of(name) or "without an extension"
    counts[f"{kind}{where and ' '}{where}"] += 1


def describe_left_out(counts: Mapping[str, int]) -> str:
    """Return one line such as ``3 .txt, 1 hidden``; empty if no file was skipped."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)
