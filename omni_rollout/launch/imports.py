"""How a command imports what it cannot do without."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imported_for_good() -> Iterator[None]:
    """What is imported inside stays until the process ends, so Python's garbage collector is spared it.

    torch, vllm-omni, diffusers and what they import make some 850,000 objects. Left on, the collector looks through all that
    there are again and again while they come, and once more whenever anybody calls `gc.collect`, as vLLM does four times
    while an engine starts. So it rests inside, and leaves out afterwards what there is by then (`gc.freeze`). For commands,
    before they have made anything: in a program of somebody else's, what it holds would not be collected either.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # as Python ends it takes modules apart, and libraries complain about what it leaves
