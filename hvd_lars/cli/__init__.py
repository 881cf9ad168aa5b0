"""The command ``hvd-lars``; imports everything, late."""

from hvd_lars.cli.main import main

__all__ = ["main"]
