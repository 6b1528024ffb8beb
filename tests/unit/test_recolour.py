"""The reward of recoloured text: against arithmetic of its own, on pictures drawn here, and what it refuses."""

from __future__ import annotations

import colorsys
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.models.base.images import describe
from omni_rollout.nano import render
from omni_rollout.nano.edit.pairs import ASKED, Edit, cases, other_colors
from omni_rollout.rewards import WeightedSum, recolour
from omni_rollout.rewards.base.contract import columns_of
from omni_rollout.rewards.recolour import HUES, LEAST_CHROMA, colors
from omni_rollout.types import Prompt

NAMES = list(HUES)


def color_of(red: int, green: int, blue: int) -> str | None:
    """By the standard library; None where two hues are as near to the last digit."""
    if max(red, green, blue) - min(red, green, blue) < LEAST_CHROMA:
        return "grey"
    hue = 360 * colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0]
    away = sorted((min((hue - degrees) % 360, (degrees - hue) % 360), name) for name, degrees in HUES.items())
    return None if away[1][0] - away[0][0] < 1e-6 else away[0][1]


@given(pixels=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_pixel_has_the_colour_of_the_nearest_hue(pixels: list[tuple[int, int, int]]) -> None:
    for place, pixel in zip(colors(np.array(pixels, np.uint8)), pixels, strict=True):
        expected = color_of(*pixel)
        assert expected is None or expected == ("grey" if place < 0 else NAMES[place]), pixel


def test_the_renderers_colours_are_what_they_are_called() -> None:
    assert set(ASKED) <= set(HUES) and "black" not in ASKED
    for name, rgb in render.COLORS.items():
        assert color_of(*rgb) == (name if name in ASKED else "grey")


def asks(folder: Path, source: render.Sign, **metadata: Any) -> Prompt:
    path = folder / f"{source.text}_{source.color}.png"
    Image.fromarray(render.draw(source)).save(path)
    return Prompt(text="make it so", images=(describe(path),), metadata=metadata)


def edit(text: str = "42", source: str = "red", color: str = "blue") -> Edit:
    return Edit(render.sample_sign(random.Random(3), text, source), color)


def reward_of(made: np.ndarray, prompt: Prompt) -> float:
    (value,) = WeightedSum({"recolour": 1.0})([made], [prompt]).total
    return value


def test_the_picture_itself_in_the_colour_asked_for_is_worth_all(tmp_path: Path) -> None:
    edits = cases((*render.NUMBERS[::9], *render.DIGITS[:4]), 30)
    prompts = [asks(tmp_path, one.source, text=one.source.text, color=one.color) for one in edits]
    targets = [render.draw(one.target) for one in edits]
    assert {one.color for one in edits} == set(ASKED) and all(one.color != one.source.color for one in edits)
    rewards = WeightedSum({"recolour": 1.0})
    assert min(rewards(targets, prompts).total) > 0.99
    sources = [render.draw(one.source) for one in edits]
    assert rewards(sources, prompts).total == [0.0] * len(edits), "nothing was changed"


def test_the_share_is_counted_among_the_pixels_of_the_text(tmp_path: Path) -> None:
    """Left half in the new colour, right half as it was; counted once more, pixel by pixel."""
    one = edit()
    prompt = asks(tmp_path, one.source, text="42", color="blue")
    source, made = render.draw(one.source), render.draw(one.target).copy()
    made[:, 32:] = source[:, 32:]
    background = np.array(one.source.background, float)
    far = [[sum((source[y, x] - background) ** 2) ** 0.5 for x in range(64)] for y in range(64)]
    most = max(max(row) for row in far)
    text = [(y, x) for y in range(64) for x in range(64) if far[y][x] > most / 2]
    blue = [place for place in text if color_of(*(int(value) for value in made[place])) == "blue"]
    assert 0.3 < len(blue) / len(text) < 0.7
    assert reward_of(made, prompt) == pytest.approx(len(blue) / len(text), abs=1e-12)


def test_another_number_a_blot_and_a_bare_ground_are_worth_nothing(tmp_path: Path) -> None:
    one = edit()
    prompt = asks(tmp_path, one.source, text="42", color="blue")
    assert reward_of(render.draw(replace(one.target, text="43")), prompt) == 0.0
    for filled in (render.COLORS["blue"], one.source.background):
        assert reward_of(np.full((64, 64, 3), filled, np.uint8), prompt) == 0.0


def test_grey_text_has_no_colour_though_it_is_read(tmp_path: Path) -> None:
    one = edit()
    prompt = asks(tmp_path, one.source, text="42", color="red")
    assert reward_of(render.draw(replace(one.source, color="black")), prompt) == 0.0


def test_a_picture_of_another_size_is_compared_at_its_own(tmp_path: Path) -> None:
    one = edit()
    prompt = asks(tmp_path, one.source, text="42", color="blue")
    twice = np.asarray(Image.fromarray(render.draw(one.target)).resize((128, 128), Image.Resampling.LANCZOS))
    assert reward_of(twice, prompt) > 0.98


def test_evaluation_tells_the_two_factors_apart(tmp_path: Path) -> None:
    one = edit()
    prompt = asks(tmp_path, one.source, text="42", color="blue")
    images = [render.draw(one.target), render.draw(one.source), render.draw(replace(one.target, text="43"))]
    rewards, prompts = WeightedSum({"recolour": 1.0}), [prompt] * 3
    found, _ = rewards.evaluate(images, prompts, rewards(images, prompts))
    share = recolour.color_share(images[2], prompt.text, columns_of(prompt))
    assert 0.3 < share < 1 and set(found) == {"recolour", "color_share", "exact_match"}
    assert found["recolour"] == pytest.approx(1 / 3) and found["exact_match"] == pytest.approx(2 / 3)
    assert found["color_share"] == pytest.approx((1 + share) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ()}, "no input image"),
        ({"metadata": {"color": "red"}}, "no metadata `text`"),
        ({"metadata": {"text": "42"}}, "no metadata `color`"),
        ({"metadata": {"text": "", "color": "red"}}, "metadata `text` is ''"),
        ({"metadata": {"text": "42", "color": "black"}}, "metadata `color` is 'black'; expected one of red, orange"),
        ({"metadata": {"text": "42", "color": ["red"]}}, r"metadata `color` is \['red'\]"),
    ],
)
def test_a_prompt_that_cannot_be_scored_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    prompt = asks(tmp_path, edit().source, text="42", color="blue")
    WeightedSum({"recolour": 1.0}).check([prompt], "image")
    with pytest.raises(UserError, match=message):
        WeightedSum({"recolour": 1.0}).check([replace(prompt, **change)], "image")


def test_a_picture_without_text_a_changed_file_and_another_kind_are_refused(tmp_path: Path) -> None:
    reward = WeightedSum({"recolour": 1.0})
    Image.new("RGB", (64, 64), (240, 240, 240)).save(tmp_path / "blank.png")
    blank = Prompt(text="a", images=(describe(tmp_path / "blank.png"),), metadata={"text": "42", "color": "red"})
    with pytest.raises(UserError, match=r"blank\.png shows no text"):
        reward.check([blank], "image")
    prompt = asks(tmp_path, edit(text="77").source, text="77", color="blue")
    Path(prompt.images[0].path).write_bytes((tmp_path / "blank.png").read_bytes())
    with pytest.raises(UserError, match="not the file that the prompt was read with"):
        reward.check([prompt], "image")
    with pytest.raises(UserError, match="reward recolour scores image, this model makes video"):
        reward.check([], "video")


def test_a_failing_image_is_named(tmp_path: Path) -> None:
    prompt = asks(tmp_path, edit().source, text="42", color="blue")
    batch = WeightedSum({"recolour": 1.0})([np.zeros((0, 5, 3), np.uint8)], [prompt])
    assert batch.total == [None] and batch.scored == []
    assert batch.failures[0].startswith("recolour: prompt 'make it so': recolour: image 0")


def test_other_colours_leave_out_the_own_one() -> None:
    assert all(color not in other_colors(color) for color in render.COLORS)
    assert other_colors("black") == ASKED
