"""Errors that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error in the user's input, printed without a traceback; exit code 2.

    Each line names the file, key or tensor, what was found and what is allowed.
    """


class DivergedError(UserError):
    """Too many steps in a row had gradients that are not finite."""
