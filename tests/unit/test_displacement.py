"""The reward of a text that moves: the true video, tricks, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.errors import UserError
from omni_rollout.nano.wan import scenes
from omni_rollout.nano.wan.scenes import DIRECTIONS, Scene, film
from omni_rollout.rewards import WeightedSum, get_reward
from omni_rollout.rewards.base.contract import texts_and_columns
from omni_rollout.rewards.displacement import FULL, moved_share
from omni_rollout.types import Prompt

SCENES = scenes.cases(scenes.TASKS[::7], 12)


def asks(scene: Scene) -> Prompt:
    return Prompt(text=scene.prompt, metadata={"text": scene.digit, "direction": scene.direction})


PROMPTS = [asks(scene) for scene in SCENES]
FILMS = [film(scene) for scene in SCENES]


def scores(made: list[np.ndarray]) -> list[float]:
    return [value or 0.0 for value in WeightedSum({"displacement": 1.0})(made, PROMPTS).total]


def test_the_true_video_is_worth_all() -> None:
    assert {scene.direction for scene in SCENES} == set(DIRECTIONS)
    assert scores(FILMS) == [1.0] * len(SCENES)
    assert get_reward("displacement").evaluate(FILMS, *texts_and_columns(PROMPTS)) == {
        "displacement": 1.0,
        "moved": 1.0,
        "exact_match": 1.0,
    }


def test_tricks_are_worth_nothing() -> None:
    blank = [np.full_like(video, 240) for video in FILMS]
    tricks = {
        "a still": [np.repeat(video[:1], len(video), axis=0) for video in FILMS],
        "the other way": [video[::-1] for video in FILMS],
        "nothing": blank,
        "gone at the end": [np.concatenate([video[:-1], empty[:1]]) for video, empty in zip(FILMS, blank, strict=True)],
        "there at the end": [np.concatenate([empty[:1], video[1:]]) for video, empty in zip(FILMS, blank, strict=True)],
        "another digit": [film(replace(scene, digit=str((int(scene.digit) + 5) % 10))) for scene in SCENES],
        "a blot that moves": [_blot(scene) for scene in SCENES],
        "dissolves": [np.concatenate([video[:-1], _blot(scene)[-1:]]) for video, scene in zip(FILMS, SCENES, strict=True)],
        "takes shape": [np.concatenate([_blot(scene)[:1], video[1:]]) for video, scene in zip(FILMS, SCENES, strict=True)],
    }
    assert {name: max(scores(made)) for name, made in tricks.items()} == dict.fromkeys(tricks, 0.0)


def _blot(scene: Scene) -> np.ndarray:
    video = np.full_like(film(scene), 240)
    for place, frame in enumerate(video):
        left = 20 + DIRECTIONS[scene.direction] * 4 * place
        frame[10:38, left : left + 24] = 10
    return video


@given(
    start=st.tuples(st.integers(0, 20), st.integers(4, 20)),
    move=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
    direction=st.sampled_from(["left", "right", "up", "down"]),
)
@settings(max_examples=100, deadline=None)
def test_the_share_is_the_way_of_a_square(start: tuple[int, int], move: tuple[int, int], direction: str) -> None:
    """Against the square's own way, in pixels."""
    left, top = start[0] + 8, start[1] + 8
    video = np.full((3, 48, 64, 3), 250, np.uint8)
    for frame, (x, y) in zip(video, ((left, top), (30, 20), (left + move[0], top + move[1])), strict=True):
        frame[y : y + 6, x : x + 5] = 0
    way = {"left": -move[0] / 64, "right": move[0] / 64, "up": -move[1] / 48, "down": move[1] / 48}[direction]
    assert moved_share(video, "", {"direction": direction}) == pytest.approx(min(1, max(0, way / FULL)), abs=1e-12)


def test_what_cannot_be_scored_is_refused() -> None:
    reward = WeightedSum({"displacement": 1.0})
    for direction in (None, "away", ["left"]):
        with pytest.raises(UserError, match=r"metadata `direction` is .*; expected one of left, right, up, down"):
            reward.check([Prompt(text="a", metadata={"text": "4", "direction": direction})], "video")
    with pytest.raises(UserError, match="names no text to read"):
        reward.check([Prompt(text="a", metadata={"direction": "left"})], "video")
    with pytest.raises(UserError, match="reward displacement scores video, this model makes image"):
        reward.check(PROMPTS, "image")
    for media in (np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 64, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"expected a uint8 array \[F, H, W, 3\]"):
            get_reward("displacement")([media], *texts_and_columns(PROMPTS[:1]))
