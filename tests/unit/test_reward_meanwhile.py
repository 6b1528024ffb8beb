"""Rewards of a step's images while others are still being sampled: what they are does not depend on who is first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import RewardConfig
from omni_rollout.rewards import Meanwhile, WeightedSum
from omni_rollout.types import Prompt


@dataclass(frozen=True)
class One:
    """What is read of requests and trajectories."""

    request_id: str
    group_id: str
    media: np.ndarray
    prompt: Prompt


IMAGES: Any = [One(f"{group}-{member}", group, np.full(1, member), Prompt(text=group)) for group in "ab" for member in range(3)]


def company(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
    """Tells what it was given together, and in which order; has no number for one of them."""
    members = [int(image[0]) for image in images]
    text = sum(3**place * member for place, member in enumerate(members)) + 100 * len(members)
    return [None if (member, prompt) == (1, "b") else text + member for member, prompt in zip(members, prompts, strict=True)]


def summed(reward: Any) -> WeightedSum:
    made = WeightedSum({"jpeg_compressibility": 2.0}, settings=RewardConfig(timeout=90))
    made.rewards["jpeg_compressibility"] = reward
    return made


@given(order=st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_groups_are_scored_together_in_their_own_order_whoever_is_first(order):
    with Meanwhile(summed(company), IMAGES) as rewards:
        for place in order:
            rewards.add(IMAGES[place])
        batch = rewards.result(IMAGES)
    together = 300.0 + 0 + 3 * 1 + 9 * 2
    group_a = [2 * (together + member) for member in range(3)]
    assert batch.total == [*group_a, group_a[0], None, group_a[2]]
    assert batch.scored == [0, 1, 2, 3, 5] and len(batch.failures) == 1 and "'b'" in batch.failures[0]


def test_a_group_is_scored_while_another_is_being_sampled():
    first = threading.Event()

    def reward(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        first.set()
        return [0.0] * len(images)

    with Meanwhile(summed(reward), IMAGES) as rewards:
        for image in IMAGES[:3]:
            rewards.add(image)
        assert first.wait(5), "the first group is complete"
        for image in IMAGES[3:]:
            rewards.add(image)
        assert rewards.result(IMAGES).total == [0.0] * 6


def test_what_has_not_begun_is_dropped_when_the_rollout_fails():
    begun: list[str] = []
    goes_on = threading.Event()

    def reward(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        begun.append(prompts[0])
        goes_on.wait(5)
        return [0.0] * len(images)

    with pytest.raises(RuntimeError, match="the engine"), Meanwhile(summed(reward), IMAGES) as rewards:
        for image in IMAGES:
            rewards.add(image)
        raise RuntimeError("the engine died")
    goes_on.set()
    assert begun in ([], ["a"])


def test_a_reward_that_hangs_does_not_keep_the_process_alive():
    """Python waits for the threads of its pools as it ends, and for no daemon."""
    code = """
import threading
from tests_of import IMAGES, summed
from omni_rollout.rewards import Meanwhile
rewards = Meanwhile(summed(lambda *_: threading.Event().wait()), IMAGES)
for image in IMAGES:
    rewards.add(image)
raise SystemExit(7)
"""
    code = code.replace("tests_of", Path(__file__).stem)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 7


def test_a_reward_computes_on_as_many_threads_as_whoever_asks_whatever_another_thread_was_given_last() -> None:
    def on_threads(images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        return [float(torch.get_num_threads())] * len(images)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    other = threading.Thread(target=torch.set_num_threads, args=[1])
    other.start()
    other.join()
    try:
        with Meanwhile(summed(on_threads), IMAGES) as rewards:
            for image in IMAGES:
                rewards.add(image)
            assert rewards.result(IMAGES).total == [4.0] * len(IMAGES)
    finally:
        torch.set_num_threads(before)
