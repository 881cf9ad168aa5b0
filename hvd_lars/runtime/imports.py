"""Objects of the user's own modules, by reference."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from hvd_lars.errors import UserError

REFERENCE = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$"


def load_callable(reference: str, key: str) -> Callable[..., Any]:
    """Import ``package.module:name``; modules in the working directory are found, too.

    An error inside the module keeps its traceback.

    Args:
        reference: matches ``REFERENCE``.
        key: of the config, for the error.

    Raises:
        UserError: there is no such module, or no such callable in it.
    """
    name, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does; the command's own script does not
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise UserError(
            f"{key}: {reference}: no module {error.name} in the working directory, on PYTHONPATH "
            f"or installed"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key}: {reference}: {name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}: {reference}: found {type(found).__name__}; a callable is needed")
    callable_: Callable[..., Any] = found
    return callable_
