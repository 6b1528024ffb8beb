"""Guards against reward hacking: each measure against independent arithmetic, each loss planted and found, no false alarm."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from omni_rollout.launch.compose import compose
from omni_rollout.monitor import find_alerts
from omni_rollout.monitor.hacking import HUES, Guards, colour_classes, colour_distance, distance, of_image
from omni_rollout.nano import render

PROMPTS = [f"sign {number}" for number in range(10) for _ in range(3)]


def signs(seed: int = 0) -> list[np.ndarray]:
    import random

    rng, colors = random.Random(seed), list(render.COLORS)
    return [render.draw(render.sample_sign(rng, str(10 + int(p.split()[1])), colors[int(p.split()[1]) % 6])) for p in PROMPTS]


@given(red=st.integers(0, 255), green=st.integers(0, 255), blue=st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_a_colour_is_the_hue_that_colorsys_gives(red: int, green: int, blue: int) -> None:
    (found,) = colour_classes(np.array([[[red, green, blue]]], np.uint8)).ravel()
    if max(red, green, blue) - min(red, green, blue) < 40:
        assert found == HUES + min(int((0.299 * red + 0.587 * green + 0.114 * blue) / 256 * 3), 2)
    else:  # colorsys takes the hexagon's hue, ours is the circle's: they agree to a few degrees
        away = abs(found * 30 - 360 * colorsys.rgb_to_hsv(red, green, blue)[0]) % 360
        assert min(away, 360 - away) <= 15 + 1.2


def test_the_measures_of_one_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    luma = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in image.tolist()]
    flat = [value for row in luma for value in row]
    mean = sum(flat) / 63
    laplacian = [
        abs(4 * luma[y][x] - luma[y - 1][x] - luma[y + 1][x] - luma[y][x - 1] - luma[y][x + 1])
        for y in range(1, 8)
        for x in range(1, 6)
    ]
    classes = colour_classes(image).ravel().tolist()
    shares = [classes.count(one) / 63 for one in set(classes)]
    assert of_image(image) == pytest.approx(
        {
            "sharpness": sum(laplacian) / 35,
            "contrast": math.sqrt(sum((value - mean) ** 2 for value in flat) / 63),
            "dark_share": sum(value < 64 for value in flat) / 63,
            "colour_entropy": -sum(share * math.log2(share) for share in shares),
        }
    )


def test_distances() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    half = np.concatenate([black[:2], white[:2]])
    assert distance(black, white) == 1 and distance(black, half) == pytest.approx(math.sqrt(0.5))
    assert colour_distance(black, white) == 1 and colour_distance(half, half[::-1]) == 0
    assert colour_distance(black, half) == pytest.approx(math.sqrt(1 - math.sqrt(0.5)))


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))


def turned(image: np.ndarray) -> np.ndarray:
    """Red becomes green, green blue, and blue red."""
    return np.ascontiguousarray(image[..., [2, 0, 1]])


LOSSES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "blur": ("sharpness", blurred),
    "grey": ("contrast", lambda image: (image // 2 + 60).astype(np.uint8)),
    "dark": ("dark_share", lambda image: (image // 4).astype(np.uint8)),
    "colourless": (
        "colour_entropy",
        lambda image: np.repeat(image.mean(axis=-1, keepdims=True).astype(np.uint8) // 2 + 127, 3, -1),
    ),
    "other colours": ("start_colour_distance", turned),
    "one picture": ("diversity", lambda image: signs()[0]),
    "another picture": ("start_distance", lambda image: 255 - image),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_found_when_the_reward_rose_and_only_then(loss: str, tmp_path: Path) -> None:
    name, change = LOSSES[loss]
    guards = Guards(tmp_path)
    metrics, notes = guards(0, signs(), PROMPTS, [0.5] * 30)
    assert not notes and "guard/start_distance" not in metrics
    worse = [change(image) for image in signs()]
    _, notes = guards(10, worse, PROMPTS, [0.6] * 30)
    assert name in notes["guard/lost"]
    assert Guards(tmp_path)(10, worse, PROMPTS, [0.6] * 30)[1] == notes, "a resumed run remembers the start"
    assert guards(10, worse, PROMPTS, [0.4] * 30)[1] == {}, "the reward fell, too: no hacking"
    assert guards(10, worse, PROMPTS, [None] * 30)[1] == {}


def test_the_same_and_nearly_the_same_images_raise_no_alarm(tmp_path: Path) -> None:
    guards = Guards(tmp_path)
    guards(0, signs(), PROMPTS, [0.5] * 30)
    metrics, notes = guards(10, signs(), PROMPTS, [0.9] * 30)
    assert notes == {} and metrics["guard/start_distance"] == metrics["guard/start_colour_distance"] == 0
    noise = np.random.default_rng(0)
    near = [np.clip(image.astype(int) + noise.integers(-3, 4, image.shape), 0, 255).astype(np.uint8) for image in signs()]
    assert guards(20, near, PROMPTS, [0.9] * 30)[1] == {}
    assert guards(30, signs(seed=7), PROMPTS, [0.9] * 30)[1] == {}, "other seeds of the same policy"


def test_without_a_start_or_with_another_nothing_is_compared(tmp_path: Path) -> None:
    assert Guards(tmp_path)(10, signs(), PROMPTS, [0.9] * 30)[1] == {}
    guards = Guards(tmp_path)
    guards(0, signs()[:4], PROMPTS[:4], [0.1] * 4)
    metrics, notes = guards(10, [255 - image for image in signs()], PROMPTS, [0.9] * 30)
    assert notes == {} and "guard/start_distance" not in metrics


@pytest.mark.parametrize("shape", [(5, 16, 16, 3), (2, 16, 16, 4)])
def test_videos_and_layers_are_guarded(shape: Any, tmp_path: Path) -> None:
    media = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    guards = Guards(tmp_path)
    assert guards(0, list(media), ["a", "a"], [0.1, 0.1])[0]["guard/diversity"] > 0
    assert guards(1, list(media), ["a", "a"], [0.2, 0.2])[0]["guard/start_distance"] == 0


def test_what_is_found_of_each_image_is_kept(tmp_path: Path) -> None:
    for step, rewards in ((0, [0.5] * 29 + [None]), (10, [0.75] * 30)):
        Guards(tmp_path)(step, signs(), PROMPTS, rewards)
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["index"]) for line in lines] == [(step, index) for step in (0, 10) for index in range(30)]
    assert [line["reward"] for line in lines] == [0.5] * 29 + [None] + [0.75] * 30
    assert [line["prompt"] for line in lines] == PROMPTS * 2
    assert [line["guards"] for line in lines[:30]] == [of_image(image) for image in signs()]


def test_large_pictures_are_kept_small(tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (4, 512, 768, 3), np.uint8)
    Guards(tmp_path)(0, list(big), ["a", "a", "b", "b"], [0.1] * 4)
    with np.load(tmp_path / "evaluation_start.npz", allow_pickle=False) as kept:
        assert kept["image_0"].shape == (171, 256, 3)


def test_the_alert_names_what_was_lost_and_how_to_hold_it() -> None:
    config = compose(["model=nano", "prompts=p.txt"])
    (alert,) = find_alerts(10, {}, config, {"guard/lost": "diversity 0.1, was 0.2"})
    assert alert.name == "reward_hacked" and "diversity 0.1, was 0.2" in alert.sentence
    assert "algorithm.kl_coef=0.01" in alert.command
