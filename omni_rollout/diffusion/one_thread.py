"""Small networks on one thread, where that is faster: with the bits of all threads, or not at all.

Of an operation of tens of microseconds a second thread takes away less than it costs to wake. What rounds by the number of
threads is the order of a sum; where the products of a network have the same bits on one thread as on all (looked at after the
self-check, layer by layer), the number is a matter of time alone, and time decides: passes of a shape are tried in turns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from omni_rollout.diffusion import products
from omni_rollout.diffusion.machine import on_one_thread
from omni_rollout.diffusion.products import WIDE, Calls
from omni_rollout.diffusion.self_check import Layer, Values, find_equal_calls, find_fused, operators

TRIES = 4  # passes of a shape on each number of threads; the first is not counted


@torch.no_grad()
def one_thread_suffices(
    layers: Iterable[Layer],
    fused: Iterable[tuple[Sequence[int], int]],
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """After `self_check` of the layers in this thread: whether it may compute on one thread what all its threads are to give.

    Not asked of a network with a wide layer, whose passes are long. Sets what `on_one_thread` multiplies by.

    Args:
        fused: (output features of the parts, input features) of fused layers.
    """
    distinct = {(layer.out_features, layer.in_features): layer for layer in layers}
    wide = any(rows * columns >= WIDE for rows, columns in distinct)
    if device.type != "cpu" or torch.get_num_threads() == 1 or products.calls() is Calls.samples or wide:
        return False
    values = Values(dtype, device)
    for layer in distinct.values():
        for conditioning in (False, True):
            if not find_equal_calls(layer, values, conditioning=conditioning, on=on_one_thread):
                return False
    for parts, features in fused:
        find_fused(parts, features, dtype=dtype, device=device, on=on_one_thread)
    for _, function, samples in operators(values, heads, head_dim):
        expected = function(samples)
        with on_one_thread():
            if not torch.equal(function(samples), expected):
                return False
    return True


class FasterThreads:
    """One thread or all of them, by the time that passes of a shape took."""

    def __init__(self) -> None:
        self.suffices = False  # `one_thread_suffices`: until it is known, all
        self._seconds: defaultdict[Hashable, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))  # all, one

    @contextmanager
    def taken(self, shape: Hashable) -> Iterator[None]:
        """Around a pass."""
        if not self.suffices:
            yield
            return
        on_all, on_one = took = self._seconds[shape]
        alone = len(on_one) < len(on_all) if len(on_one) < TRIES else min(on_one[1:]) < min(on_all[1:])
        with on_one_thread() if alone else nullcontext():
            start = time.perf_counter()
            yield
            if len(took[alone]) < TRIES:
                took[alone].append(time.perf_counter() - start)
