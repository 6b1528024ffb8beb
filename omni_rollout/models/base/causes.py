"""What a cause of a difference is: one rule that the trainer breaks for as long as a context lasts.

Causes that any family may have are in `parity/causes.py`, a family's own in its `causes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omni_rollout.types import Trajectory


@dataclass(frozen=True)
class Setting:
    """What a cause may need to know."""

    policy: nn.Module
    family: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Cause:
    name: str
    breaks: str
    settled_by: str  # the file that keeps the rule
    broken: Callable[[Setting], AbstractContextManager[None]]
    record: Callable[[Trajectory], Trajectory] = lambda trajectory: trajectory
    slow: bool = False  # left out of the cumulative series


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def nothing(_: Setting) -> Iterator[None]:
    yield


@contextmanager
def changed_text(setting: Setting, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Changes the keyword arguments of every call of the transformer."""

    def hook(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = dict(inputs)
        change(changed)
        return args, changed

    handle = setting.policy.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
