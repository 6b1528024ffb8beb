"""Algorithms: one file each, found by the file's name; others by `algorithm.source`, or by an entry point.

An entry point of the group `omni_rollout.algorithms` is NAME = "package.module" or "package.module:Class".

An algorithm is a dataclass: its fields are the keys of the section `algorithm`, its methods are the formulas.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from omni_rollout import plugins
from omni_rollout.algorithms.base import Algorithm, Coupled, Forward
from omni_rollout.config import AlgorithmConfig
from omni_rollout.errors import UserError

_SHARED = ("base", "rollout_correction")


def names() -> list[str]:
    """Of all that need no source; imports none of them."""
    return plugins.registered("algorithms", _SHARED)


def algorithm_class(name: str, source: str | None = None) -> type[Algorithm]:
    """The algorithm of `omni_rollout/algorithms/<name>.py`, of the entry point of that name, or of `source`.

    Raises:
        UserError: there is none; the message names the nearest. Or the source cannot be imported, or holds no algorithm.
    """
    if source is not None:
        return _of_source(source)
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"algorithm.name={name}: {hint}expected one of {', '.join(known)}, or algorithm.source=FILE.py")
    point = plugins.entry("omni_rollout.algorithms", name)
    if point is not None:
        return _of_source(point.value)
    return _only_algorithm(import_module(f"{__name__}.{name}"), f"algorithm.name={name}")


def get_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a configuration names, with its keys; one that was composed is that already."""
    if isinstance(config, Coupled | Forward):
        return config
    return algorithm_class(config.name, config.source)(**asdict(config))


def source_name(source: str) -> str:
    """What an algorithm of this source is called."""
    return Path(source.partition(".py:")[0].partition(":")[0]).name.removesuffix(".py").rpartition(".")[2]


def _of_source(source: str) -> type[Algorithm]:
    where = f"algorithm.source={source}"
    path, _, name = source.partition(":")
    try:
        module = plugins.load_module(path)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"{where}: cannot be imported, {type(error).__name__}: {error}") from error
    if name:
        kind = getattr(module, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Algorithm)):
            raise UserError(f"{where}: {path} has no class {name} that is an algorithm; subclass Coupled or Forward")
        return _as_dataclass(kind)
    return _only_algorithm(module, where)


def _only_algorithm(module: ModuleType, where: str) -> type[Algorithm]:
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Coupled | Forward) and kind.__module__ == module.__name__
    ]
    if len(found) != 1:
        several = ", ".join(kind.__name__ for kind in found) or "none"
        raise UserError(f"{where}: expected one class that subclasses Coupled or Forward, found {several}; name it, `:Class`")
    return _as_dataclass(found[0])


def _as_dataclass(kind: Any) -> type[Algorithm]:
    """Annotations are keys, also where the decorator was forgotten."""
    return kind if "__dataclass_fields__" in vars(kind) else dataclass(kind)
