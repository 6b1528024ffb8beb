"""Whoever asks for images, and the engine's thread when it has made them or taken weights, let their idle helpers go."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from omni_rollout.rollout.engine import RolloutEngine
from tests.parity.conftest import Sides


def threads() -> int:
    time.sleep(0.3)  # one that ends takes a moment
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp's")
def test_one_thread_at_a_time_has_helpers(checkpoint):
    before, numbers = torch.get_num_threads(), torch.randn(2**20)
    sides = object.__new__(Sides)
    sides._count = 0
    torch.set_num_threads(2)
    try:
        with RolloutEngine(checkpoint, max_num_seqs=2) as engine:
            engine.pipeline.denoise_step = computing(engine.pipeline.denoise_step, numbers, seen := [])
            list(engine.generate([sides.request(1, "a cat")]))
            nobody_has = threads()
            numbers * numbers
            assert threads() == nobody_has + 1
            list(engine.generate([sides.request(2, "a cat")]))
            assert threads() == nobody_has
            engine._rpc("let_helpers_go")
            assert threads() == nobody_has
            engine.pipeline.load_weights = computing(engine.pipeline.load_weights, numbers, seen)
            engine.update_weights(list(engine.policy_tensors().items()), 1)
            assert threads() == nobody_has
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def computing(own, numbers: torch.Tensor, seen: list[int]):
    """`own`, after an operation that takes all threads of whoever calls it."""

    def step(*arguments, **named):
        seen.append(torch.get_num_threads())
        numbers * numbers
        return own(*arguments, **named)

    return step
