"""The picture of a run's rewards has both curves where its figures are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from omni_rollout.monitor.curve import _HELD_OUT, _TRAINED, reward_curve


def places(lines: list[dict[str, Any]], colour: tuple[int, int, int]) -> np.ndarray:
    """(row, column) of every pixel of that colour below the legend."""
    picture = reward_curve(lines)
    assert picture is not None
    rows, columns = np.nonzero((np.asarray(picture)[30:] == colour).all(-1))
    return np.stack([rows, columns])


def test_a_rising_reward_rises() -> None:
    lines = [{"step": step, "critic/rewards/mean": 0.5 + step / 100} for step in range(1, 41)]
    lines += [{"step": 0, "evaluation/reward": 0.6, "evaluation/reward_se": 0.05}, {"step": 40, "evaluation/reward": 0.9}]
    for colour in (_TRAINED, _HELD_OUT):
        rows, columns = places(lines, colour)
        assert np.corrcoef(rows, columns)[0, 1] < -0.9, "up is a smaller row"
    assert places(lines, _HELD_OUT)[1].min() == 56, "step 0 is the left edge"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "critic/rewards/mean": 0.5}],
        [{"step": 1, "critic/rewards/mean": None}, {"step": 2, "critic/rewards/mean": math.nan}],
        [{"step": 0, "evaluation/reward": 0.5}, {"step": 1, "critic/rewards/mean": 0.5}],
    ],
)
def test_of_fewer_than_two_figures_nothing_is_drawn(lines: list[dict[str, Any]]) -> None:
    assert reward_curve(lines) is None


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_a_level_reward_is_drawn(value: float) -> None:
    assert places([{"step": step, "critic/rewards/mean": value} for step in (1, 2)], _TRAINED).size
