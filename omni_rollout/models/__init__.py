"""Model families: one folder each, with `spec.py`, `velocity.py`, `rollout.py` (engine side), `policy.py` (trainer side)."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def families() -> list[str]:
    return sorted(folder.name for folder in Path(__file__).parent.iterdir() if (folder / "spec.py").exists())


def family_module(family: str, part: str) -> ModuleType:
    """`omni_rollout.models.<family>.<part>`.

    Raises:
        ValueError: no such family; the message names the nearest.
    """
    if find_spec(f"omni_rollout.models.{family}") is None or family not in families():
        near = difflib.get_close_matches(family, families(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.family={family}: expected one of {', '.join(families())}{hint}")
    return import_module(f"omni_rollout.models.{family}.{part}")
