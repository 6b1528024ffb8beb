"""Algorithms: one file each, with `advantages` and `loss`, found by the file's name."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from types import ModuleType

from omni_rollout.errors import UserError


def get_algorithm(name: str) -> ModuleType:
    """The module `omni_rollout.algorithms.<name>`.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"algorithm={name}: expected one of {', '.join(known)}{hint}")
    return import_module(f"{__name__}.{name}")
