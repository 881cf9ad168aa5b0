"""Files that must survive a crash or be verified."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, final

from hvd_lars.errors import UserError


def expand_user(path: str | Path, key: str) -> Path:
    """Return the path with ``~`` expanded; UserError names the key if that cannot be."""
    if "\0" in str(path):
        raise UserError(f"{key}: found {str(path)!r}; a path has no null character")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME, and a user unknown to the system
        raise UserError(
            f"{key}: {path}: this user has no home folder; set HOME, or write the path without ~"
        ) from None


def cache_folder(name: str) -> Path | None:
    """Return the folder for cached things of a kind; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "hvd_lars" / name if not base.startswith("~") else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def let_umask_decide(path: Path) -> None:
    """Give a file the mode of a newly created one; some writers make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def replace_text(path: Path, text: str) -> None:
    """Replace a file by the whole text, or leave it untouched; an OSError names the file."""
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    draft = path.with_name(f"{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_output(path: Path, text: str, option: str = "") -> None:
    """Replace a file that the user named, as with ``--save: ``; raises UserError."""
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{option}{path}: cannot be written: {error.strerror}") from None


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@final
class HashingWriter:
    """A write-only file that computes the SHA-256 of its contents."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.position = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.digest.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.position
