"""What the engine computes on one thread has the bits that it, and the trainer, compute on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from omni_rollout.diffusion.machine import on_one_thread
from omni_rollout.diffusion.one_thread import FasterThreads
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import Trajectory
from tests.parity.conftest import Sides


def sampled(model: str, dtype: str, monkeypatch: pytest.MonkeyPatch, *, alone: bool) -> tuple[list[Trajectory], set[int]]:
    sides = object.__new__(Sides)
    sides._count = 0
    seen: set[int] = set()

    @contextmanager
    def taken(self: FasterThreads, shape: object) -> Iterator[None]:
        with on_one_thread() if alone and self.suffices else nullcontext():
            seen.add(torch.get_num_threads())
            yield

    monkeypatch.setattr(FasterThreads, "taken", taken)
    with RolloutEngine(model, dtype=dtype, max_num_seqs=5) as engine:
        seen.clear()  # the warm-up, before it is known
        return sorted(engine.generate(sides.mixed()), key=lambda made: made.request_id), seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_is_another_on_one_thread(checkpoint, dtype, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone, on_one = sampled(checkpoint, dtype, monkeypatch, alone=True)
        together, on_two = sampled(checkpoint, dtype, monkeypatch, alone=False)
    finally:
        torch.set_num_threads(threads)
    if on_one == {2}:
        pytest.skip("on this machine the products of small layers round by the number of threads")
    assert (on_one, on_two) == ({1}, {2}) and len(alone) == len(together) > 4
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.log_probs, other.log_probs)
        assert (one.media == other.media).all()
