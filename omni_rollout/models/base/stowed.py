"""Memory of tensors that leaves its device for a while and comes back in place.

Storages are emptied and filled again: views, parts of fused weights and whoever shares a tensor see the same bytes after.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from omni_rollout.diffusion.host import return_freed_memory
from omni_rollout.errors import RunFailedError


class Stowed:
    """Some tensors, here at first. A tensor that is away must not be read: it has no memory.

    On an accelerator bytes wait in pinned memory of the host. On a CPU, where that would be the same memory, they wait in a
    file without a name, which is gone when this process is. Memory that torch cannot empty, such as a mapped file, stays.

    Args:
        tensors: asked for each time that they leave.
        folder: where the file lies.
        constant: they are the same tensors each time, and nobody writes into them: their bytes are kept once.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], folder: Path, *, constant: bool = False) -> None:
        self._tensors, self._folder, self._constant = tensors, folder, constant
        self._away: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._kept: _Pinned | _File | None = None

    def leave(self) -> None:
        """Does nothing where they are away.

        Raises:
            RunFailedError: their file cannot be written; they are still here.
        """
        if self._away:
            return
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self._tensors()}
        leaving = [one for one in storages.values() if one.nbytes() and one.resizable()]
        sizes = [one.nbytes() for one in leaving]
        if self._kept is None or not self._constant:
            place = self._kept if self._kept is not None and sizes == self._sizes else self._place(leaving)
            place.write([_bytes(one) for one in leaving])
            self._kept, self._sizes = place, sizes
        for storage in leaving:
            storage.resize_(0)
        self._away = leaving
        return_freed_memory()

    def come_back(self) -> None:
        """Does nothing where they are here."""
        if not self._away:
            return
        assert self._kept is not None
        for storage, size in zip(self._away, self._sizes, strict=True):
            storage.resize_(size)
        self._kept.read([_bytes(one) for one in self._away])
        self._away = []

    def _place(self, storages: Sequence[torch.UntypedStorage]) -> _Pinned | _File:
        on_cpu = all(one.device.type == "cpu" for one in storages)
        return _File(self._folder) if on_cpu else _Pinned([one.nbytes() for one in storages])


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """[bytes] uint8, the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, for as long as it lives. With numpy's, torch could not empty it any more."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else memoryview(b"")


class _Pinned:
    def __init__(self, sizes: Iterable[int]) -> None:
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]

    def write(self, sources: Iterable[torch.Tensor]) -> None:
        for host, source in zip(self._host, sources, strict=True):
            host.copy_(source)

    def read(self, targets: Iterable[torch.Tensor]) -> None:
        for host, target in zip(self._host, targets, strict=True):
            target.copy_(host)


class _File:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is open for as long as this is
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunFailedError:
        return RunFailedError(
            f"{self._folder}: {error.strerror}, while memory was offloaded to a file there; make room, or leave out "
            "rollout.offload and trainer.offload"
        )

    def write(self, sources: Iterable[torch.Tensor]) -> None:
        place = 0
        try:
            for view in map(memory, sources):
                while view:
                    written = os.pwrite(self._file.fileno(), view, place)
                    view, place = view[written:], place + written
        except OSError as error:
            raise self._failed(error) from error

    def read(self, targets: Iterable[torch.Tensor]) -> None:
        place = 0
        for view in map(memory, targets):
            while view:
                read = os.preadv(self._file.fileno(), [view], place)
                if not read:
                    raise RunFailedError(f"{self._folder}: what was offloaded to a file there has become shorter")
                view, place = view[read:], place + read
