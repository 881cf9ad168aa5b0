"""Errors that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong: shown as its lines alone, without a traceback; exit 2.

    Each line names the file, key or tensor, what was found and what is allowed.
    """
