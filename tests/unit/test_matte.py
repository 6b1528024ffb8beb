"""The reward of a number laid off its background: the true layers, tricks, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.models.base.images import describe
from omni_rollout.nano import render
from omni_rollout.nano.layered import pictures
from omni_rollout.rewards import WeightedSum, get_reward
from omni_rollout.rewards.base.contract import texts_and_columns
from omni_rollout.rewards.matte import agreement
from omni_rollout.types import InputImage, Prompt

SIGNS = pictures.cases((*render.NUMBERS[::9], *render.DIGITS[2:5]), 12)


def asks(folder: Path, sign: render.Sign) -> Prompt:
    path = folder / f"{sign.text}_{sign.color}.png"
    Image.fromarray(render.draw(sign)).save(path)
    return Prompt(text=render.prompt_for(sign.text, sign.color), images=(describe(path),), metadata={"text": sign.text})


def stack(*layers: np.ndarray) -> np.ndarray:
    return np.stack(layers)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    folder = tmp_path_factory.mktemp("signs")
    return [asks(folder, sign) for sign in SIGNS]


def scores(made: list[np.ndarray], prompts: list[Prompt]) -> list[float]:
    return [value or 0.0 for value in WeightedSum({"matte": 1.0})(made, prompts).total]


def test_the_true_layers_are_worth_all(prompts: list[Prompt]) -> None:
    truth = [stack(*pictures.layers(sign)) for sign in SIGNS]
    assert min(scores(truth, prompts)) > 0.97
    assert get_reward("matte").evaluate(truth, *texts_and_columns(prompts))["exact_match"] == 1.0


def test_tricks_are_worth_nothing(prompts: list[Prompt]) -> None:
    for trick in ("the whole picture", "nothing", "a hole", "in the wrong order"):
        made = []
        for sign in SIGNS:
            ground, number = pictures.layers(sign)
            hole = np.dstack([number[..., :3], 255 - number[..., 3]])
            empty = np.dstack([number[..., :3], np.zeros_like(number[..., 3])])
            made.append(
                {
                    "the whole picture": stack(ground, pictures.composite(sign)),
                    "nothing": stack(ground, empty),
                    "a hole": stack(ground, hole),
                    "in the wrong order": stack(number, ground),
                }[trick]
            )
        assert max(scores(made, prompts)) < 0.01, trick


def test_another_number_is_worth_less_than_its_share(prompts: list[Prompt]) -> None:
    others = [stack(*pictures.layers(sign)) for sign in SIGNS[1:] + SIGNS[:1]]
    assert max(scores(others, prompts)) < 0.5


@pytest.fixture(scope="module")
def left_half(tmp_path_factory: pytest.TempPathFactory) -> InputImage:
    """8 x 8; the text is its left half, but for the two rows above and below."""
    pixels = np.full((8, 8, 3), 240, np.uint8)
    pixels[2:6, :4] = 10
    path = tmp_path_factory.mktemp("half") / "half.png"
    Image.fromarray(pixels).save(path)
    return describe(path)


@given(alpha=st.binary(min_size=64, max_size=64))
@settings(max_examples=100, deadline=None)
def test_the_agreement_is_that_of_two_sets_of_pixels(alpha: bytes, left_half: InputImage) -> None:
    covered = np.frombuffer(alpha, np.uint8).reshape(8, 8)
    layers = np.dstack([np.zeros((8, 8, 3), np.uint8), covered])[None]
    text = {(row, column) for row in range(2, 6) for column in range(4)}
    ours = {(row, column) for row in range(8) for column in range(8) if covered[row, column] >= 128}
    assert agreement(layers, "", {"images": [asdict(left_half)]}) == len(text & ours) / len(text | ours)


def test_what_cannot_be_scored_is_refused(prompts: list[Prompt], tmp_path: Path) -> None:
    reward = WeightedSum({"matte": 1.0})
    with pytest.raises(UserError, match="has no input image"):
        reward.check([Prompt(text="a", metadata={"text": "42"})], "layers")
    blank = tmp_path / "blank.png"
    Image.new("RGB", (64, 64), "white").save(blank)
    with pytest.raises(UserError, match="shows no text"):
        reward.check([Prompt(text="a", images=(describe(blank),), metadata={"text": "42"})], "layers")
    with pytest.raises(UserError, match="names no text to read"):
        reward.check([Prompt(text="a", images=prompts[0].images)], "layers")
    with pytest.raises(UserError, match="reward matte scores layers, this model makes video"):
        reward.check(prompts, "video")
    for media in (np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected a uint8 array \[L, H, W, 4\]"):
            get_reward("matte")([media], *texts_and_columns(prompts[:1]))
