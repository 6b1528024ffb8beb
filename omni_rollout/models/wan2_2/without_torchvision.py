"""Lets vllm-omni's Wan2.2 package be imported where torchvision is not: two of its modules import it, for functions that are
never called here. No build of torchvision for this torch runs on a CPU, so CPU installs have none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import ClassVar

from transformers.utils.import_utils import is_torchvision_available

WRITTEN_FOR = "0.28.0"  # of vllm-omni
NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


class _StandIn(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what importers ask every module for
            raise AttributeError(name)
        raise ImportError(f"{self.__name__}.{name} is needed, and torchvision cannot be imported here; install it")


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Inside, `import torchvision` works; afterwards nobody can believe that it is there.

    Raises:
        ImportError: it is not there, and vllm-omni is another than this was written for.
    """
    if _importable():
        yield
        return
    found = version("vllm-omni")
    if found != WRITTEN_FOR:
        raise ImportError(
            f"vllm-omni's Wan2.2 needs torchvision; without it only vllm-omni {WRITTEN_FOR} is known to work, here is {found}: "
            f"install a torchvision that fits torch {version('torch')}, or vllm-omni {WRITTEN_FOR}"
        )
    is_torchvision_available()  # transformers remembers its first answer: let it be now
    stand_ins = {name: _StandIn(name) for name in NAMES}
    for name, module in stand_ins.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], leaf, module)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)


def _importable() -> bool:
    try:
        import_module("torchvision.transforms.functional")
    except (ImportError, RuntimeError, OSError):  # one built for another torch fails in its libraries
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True
