"""Model families: one folder each, with `spec.py`, `velocity.py`, `rollout.py` (engine side), `policy.py` (trainer side).

`base/` holds what is the same for all. A part that a family has no file for is its parent's: `PARENT` in its `spec.py`.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


@cache  # asked for by every capsule
def families() -> tuple[str, ...]:
    return tuple(sorted(folder.name for folder in Path(__file__).parent.iterdir() if (folder / "spec.py").exists()))


@cache  # asked for by every sample at every step
def family_module(family: str, part: str) -> ModuleType:
    """`omni_rollout.models.<family>.<part>`, or the nearest ancestor's.

    Raises:
        ValueError: no such family; the message names the nearest.
    """
    known = families()
    if family not in known:
        near = difflib.get_close_matches(family, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.family={family}: expected one of {', '.join(known)}{hint}")
    package = f"{__name__}.{family}"
    parent = import_module(f"{package}.spec").PARENT
    if parent is not None and find_spec(f"{package}.{part}") is None:
        return family_module(parent, part)
    return import_module(f"{package}.{part}")


def family_of(transformer: object) -> str:
    """The family without a parent whose `spec.TRANSFORMER` is a class of this transformer: for what all of one class share."""
    names = {kind.__name__ for kind in type(transformer).__mro__}  # trainer engines put subclasses of theirs in front
    for family in families():
        spec = family_module(family, "spec")
        if spec.PARENT is None and spec.TRANSFORMER in names:
            return family
    raise ValueError(f"{type(transformer).__name__} is no transformer of {', '.join(families())}")
