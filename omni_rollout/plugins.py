"""What others bring along: modules named `package.module` or `path/to/file.py`, functions in them, and entry points."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Container
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from omni_rollout.errors import UserError

FORMS = "package.module:function or path/to/file.py:function"
_FUNCTION = re.compile(r"(?P<place>[^:]+):(?P<name>[A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def is_function(source: str) -> bool:
    """Whether it has the form of a function's name; not whether there is such a function."""
    return not is_address(source) and _FUNCTION.fullmatch(source) is not None


def function_problem(source: str) -> str | None:
    """What is wrong with the name of a function, as far as can be said without running anything of it."""
    found = _FUNCTION.fullmatch(source)
    if found is None:
        return f"expected {FORMS}"
    place = found["place"]
    if place.endswith(".py"):
        return None if os.path.isfile(place) else f"no such file: {place}"
    return None if _MODULE.fullmatch(place) else f"{place} is neither a module nor a file that ends in .py; expected {FORMS}"


def load_function(key: str, source: str) -> Callable[..., Any]:
    """The function that `source` names, see `load_module`.

    Args:
        key: of the configuration, for the error.

    Raises:
        UserError: there is none, or the file raised as it was read.
    """
    if problem := function_problem(source):
        raise UserError(f"{key}={source}: {problem}")
    place, _, name = source.rpartition(":")
    try:
        module = load_module(place)
    except (Exception, SystemExit) as error:  # whatever the file of somebody else raises
        raise UserError(f"{key}={source}: {place} raised as it was read: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "no such name" if function is None else f"{name} is {type(function).__name__}, expected a function"
        raise UserError(f"{key}={source}: {what} in {place}")
    return function


def entry(group: str, name: str) -> EntryPoint | None:
    """What another installed package has registered under this name."""
    return next(iter(entry_points(group=group, name=name)), None)


def load_entry(point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        UserError: its package lacks the module or the name, or the module raised as it was read.
    """
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # whatever the package of somebody else raises
        package = point.dist.name if point.dist is not None else "the package that registered it"
        raise UserError(
            f"{point.name}: the entry point {point.value} of {package} cannot be loaded: {type(error).__name__}: {error}; "
            f"does {package} bring that module along?"
        ) from error


def registered(room: str, but: Container[str] = ("base",)) -> list[str]:
    """The files of one of this package's folders, and the entry points of `omni_rollout.ROOM`; nothing of them is imported."""
    files = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / room)]) if module.name not in but]
    return sorted({*files, *(point.name for point in entry_points(group=f"omni_rollout.{room}"))})


def load_module(place: str) -> ModuleType:
    """A file's module, read once, or one by its dotted name. The file's folder, or the current one, can be imported from
    afterwards, at the end of the search path: nothing installed is hidden by it. Raises what the module raises.
    """
    if not place.endswith(".py"):
        _look_in(Path.cwd())
        return import_module(place)
    path = Path(place).absolute()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # two files may have one name
    if name in sys.modules:
        return sys.modules[name]
    _look_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
