"""What the C libraries of a host do with memory and threads between two operations on a CPU. No bit depends on it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
KEPT = 2**30  # bytes free at the end of the heap that are not handed back
MAPPED = 2**27  # bytes from which on a block has a mapping of its own, for as long as it lives
SOFT = 1  # omp_pause_soft: what was set stays


@cache
def keep_freed_memory() -> bool:
    """The next intermediate result is made of the pages of the last; for this process and threads that start later.

    glibc hands large blocks back to the kernel as they are freed, which clears every page again that is touched later; a thread
    that is not the first one has arenas of 64 MiB that come and go even more often: a sixth of a pass of a wide layer.

    Returns:
        Whether it is so. Nothing is done beside a GPU, nor where the environment says how glibc is to allocate.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or torch.cuda.is_available():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc's
        return False
    taken = [mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_THRESHOLD, MAPPED), mallopt(M_TRIM_THRESHOLD, KEPT)]
    return all(taken)


def return_freed_memory() -> None:
    """Hands all that is free back to the kernel: where memory was freed for the sake of others."""
    with suppress(OSError, AttributeError):  # not glibc's
        ctypes.CDLL(None).malloc_trim(0)


def let_helpers_go() -> None:
    """Ends the calling thread's idle helpers; its next operation makes new ones, in a millisecond.

    libgomp gives every thread that computes helpers of its own, and keeps them. Where all threads and helpers of a process are
    more than its processors, a helper without work sleeps after a microsecond instead of spinning for some milliseconds, and to
    wake it takes longer than most operations of a small network: 48 us instead of 7. So whoever hands over to another thread
    lets its own go first.
    """
    pause = _pause()
    if pause is not None:
        pause(SOFT)


@cache
def _pause() -> Callable[[int], Any] | None:
    """`omp_pause_resource_all` of the libgomp that torch computes with; other runtimes pause for the whole process."""
    try:
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        if hasattr(runtime, "__kmpc_fork_call"):  # LLVM's or Intel's
            return None
        return runtime.omp_pause_resource_all
    except (OSError, AttributeError):
        return None
