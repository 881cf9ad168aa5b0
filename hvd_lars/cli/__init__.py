"""The command ``hvd-lars``."""

from hvd_lars.cli.main import main

__all__ = ["main"]
