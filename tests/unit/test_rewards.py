"""Rewards on images drawn here: formula, targets, errors that name the image, and the reading itself."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from omni_rollout.errors import UserError
from omni_rollout.rewards import RewardError, WeightedSum, get_reward, jpeg_compressibility
from omni_rollout.rewards.base.contract import Columns, columns_of, score_each, texts_and_columns
from omni_rollout.rewards.ocr import OCRReward, _engine, edit_distance, similarity, target_text
from omni_rollout.types import Prompt

WORDS = st.text("ab1 ", max_size=6)
BLANK = np.full((64, 64, 3), 240, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def sign(text: str, size: int = 64, font_size: int = 36) -> np.ndarray:
    image = Image.new("RGB", (size, size), (235, 240, 230))
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).text((size // 2, size // 2), text, font=font, fill=(15, 50, 215), anchor="mm")
    return np.asarray(image)


def asks_for(text: str) -> Prompt:
    return Prompt(text=f'a sign that says "{text}"')


def asked(*texts: str) -> tuple[list[str], list[Columns]]:
    return texts_and_columns([asks_for(text) for text in texts])


@cache
def recursive_edit_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        recursive_edit_distance(first[1:], second) + 1,
        recursive_edit_distance(first, second[1:]) + 1,
        recursive_edit_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@given(first=WORDS, second=WORDS)
@settings(deadline=None, max_examples=200)
def test_edit_distance_is_the_recursive_definition(first: str, second: str) -> None:
    assert edit_distance(first, second) == recursive_edit_distance(first, second)


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("42", "42", 1.0),
        (" He llo", "hellO", 1.0),
        ("43", "42", 0.5),
        ("421", "42", 0.5),
        ("", "42", 0.0),
        ("nothing like it", "42", 0.0),
        ("kitten", "sitting", 4 / 7),
    ],
)
def test_similarity(read: str, wanted: str, expected: float) -> None:
    assert similarity(read, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(text='says "42" and "43"'), "42"),
        (Prompt(text="写着“你好”的牌子"), "你好"),
        (Prompt(text='says "42"', metadata={"text": "Hi you"}), "Hi you"),
    ],
)
def test_target_text(prompt: Prompt, expected: str) -> None:
    assert target_text(prompt.text, columns_of(prompt)) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(text="a cat"), "'a cat' names no text to read"),
        (Prompt(text='a "cat'), "names no text to read"),
        (Prompt(text='a "" cat'), "the quotation is ''"),
        (Prompt(text="a cat", metadata={"text": 42}), "metadata `text` is 42"),
        (Prompt(text='a "cat"', metadata={"text": "  "}), "metadata `text` is '  '"),
    ],
)
def test_prompts_without_a_target_are_refused_before_any_work(prompt: Prompt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedSum({"jpeg_compressibility": 1.0, "ocr": 1.0}).check([asks_for("42"), prompt], "image")
    with pytest.raises(UserError, match=message):
        OCRReward()([BLANK], [prompt.text], [columns_of(prompt)])


def test_ocr_reads_what_is_drawn() -> None:
    reward = OCRReward()
    images, prompts = [sign("42"), sign("42"), BLANK, sign("Key", font_size=28)], asked("42", "17", "42", "kEy")
    assert reward(images, *prompts) == [1.0, 0.0, 0.0, 1.0]
    assert reward.read(images) == ["42", "42", "", "Key"]
    assert reward.exact_match(images, *prompts) == [True, False, False, True]


def test_ocr_finds_several_lines_in_a_large_image() -> None:
    canvas = np.full((256, 256, 3), 240, np.uint8)
    canvas[20:84, 20:84], canvas[170:234, 180:244] = sign("42"), sign("17")
    reward = OCRReward()
    assert reward.read([canvas]) == ["4217"]
    assert reward([canvas, np.full((256, 256, 3), 240, np.uint8)], *asked("42 17", "42 17")) == [1.0, 0.0]


def test_a_wide_image_is_read_with_the_stock_shape() -> None:
    image = np.concatenate([sign("42"), sign("17"), sign("88")], axis=1)
    _engine.cache_clear()
    assert OCRReward()([image], *asked("421788")) == [1.0]
    _engine(1, False)
    assert _engine.cache_info()[:2] == (1, 1)  # hits, misses


def test_only_the_reward_reads_with_the_narrow_shape() -> None:
    assert _engine(1, True).cfg.Rec.rec_img_shape == [3, 48, 96]
    assert _engine(1, False).cfg.Rec.rec_img_shape == [3, 48, 320]
    _engine.cache_clear()
    reward = OCRReward()
    reward.exact_match([sign("42")], *asked("42"))
    reward.evaluate([sign("42")], *asked("42"))
    assert _engine.cache_info().currsize == 1
    _engine(1, False)
    assert _engine.cache_info().hits == 2
    reward([sign("42")], *asked("42"))
    assert _engine.cache_info().currsize == 2


def test_ocr_stays_on_its_threads_and_leaves_logging_alone() -> None:
    engine = _engine(1, True)
    engine(BLANK, use_det=False, use_cls=False, use_rec=True)
    assert engine.text_rec.session.session.get_session_options().intra_op_num_threads == 1
    assert engine.text_rec.session.session.get_session_options().inter_op_num_threads == 1
    assert logging.getLogger("RapidOCR").level == logging.ERROR
    assert logging.root.manager.disable == 0 and logging.getLogger().isEnabledFor(logging.WARNING)


def test_jpeg_compressibility_is_minus_the_kilobytes() -> None:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG", quality=95)
    blank, noise = jpeg_compressibility.make(1)([BLANK, NOISE], ["a", "a"], [{}, {}])
    assert noise == -len(buffer.getvalue()) / 1000
    assert noise < -5 < -1 < blank < 0


def test_weighted_sum_keeps_the_parts() -> None:
    images, prompts = [sign("42"), BLANK], [asks_for("42")] * 2
    rewards = WeightedSum({"ocr": 2.0, "jpeg_compressibility": 0.5})(images, prompts)
    assert set(rewards.breakdown) == {"ocr", "jpeg_compressibility"}
    assert rewards.breakdown["ocr"] == [1.0, 0.0]
    jpeg = rewards.breakdown["jpeg_compressibility"]
    assert rewards.total == [2.0 + 0.5 * jpeg[0], 0.5 * jpeg[1]]


def test_evaluation_gives_the_means_of_all_rewards() -> None:
    images, prompts = [sign("42"), sign("42"), BLANK, sign("42")], [*map(asks_for, ("42", "43", "42", "42"))]
    rewards = WeightedSum({"ocr": 2.0, "jpeg_compressibility": 0.5})
    jpeg = jpeg_compressibility.make(1)(images, *texts_and_columns(prompts))
    expected = {"exact_match": 0.5, "ocr": 2.5 / 4, "jpeg_compressibility": sum(jpeg) / 4}
    found, failures = rewards.evaluate(images, prompts, rewards(images, prompts))
    assert found == pytest.approx(expected) and not failures


@pytest.mark.parametrize(
    ("weights", "threads", "message"),
    [
        ({"orc": 1.0}, 1, "'orc' is unknown; did you mean 'ocr'"),
        ({"jpeg": 1.0}, 1, "did you mean 'jpeg_compressibility'"),
        ({"base": 1.0}, 1, "'base' is unknown"),
        ({"../ocr": 1.0}, 1, "unknown"),
        ({}, 1, "is empty"),
        ({"ocr": math.nan}, 1, r"reward\.weights\.ocr=nan"),
        ({"ocr": 1.0}, 0, r"reward\.threads=0"),
    ],
)
def test_wrong_configuration_is_refused(weights: dict[str, float], threads: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedSum(weights, threads)


@pytest.mark.parametrize("name", ["ocr", "jpeg_compressibility"])
def test_every_reward_keeps_the_protocol(name: str) -> None:
    reward = get_reward(name)
    assert reward.kinds == {"image"}
    assert reward([], [], []) == []
    values = reward([NOISE, sign("42")], *asked("42", "42"))
    assert len(values) == 2 and all(type(value) is float and math.isfinite(value) for value in values)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([BLANK], "1 images and 2 prompts"),
        ([BLANK, BLANK.astype(np.float32)], r"image 1 is float32 \[64, 64, 3\]"),
        ([BLANK, BLANK[..., 0]], r"image 1 is uint8 \[64, 64\]"),
        ([Image.fromarray(BLANK), BLANK], "image 0 is Image"),
    ],
)
def test_wrong_images_are_refused(images: Sequence[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jpeg_compressibility.make(1)(images, ["a", "a"], [{}, {}])


@pytest.mark.parametrize(("value", "message"), [(None, "float"), (math.nan, "the reward is nan")])
def test_a_failing_image_is_named(value: float | None, message: str) -> None:
    def score(image: np.ndarray, prompt: str, columns: Columns) -> float:
        return 1.0 if image is BLANK else value  # type: ignore[return-value]

    with pytest.raises(RewardError, match=rf"mine: image 1 of 2, prompt 'b': .*{message}"):
        score_each("mine", [BLANK, NOISE], ["a", "b"], [{}, {}], score)


def test_an_image_ocr_cannot_open_is_named() -> None:
    empty = np.zeros((0, 5, 3), np.uint8)
    with pytest.raises(RewardError, match="ocr: image 1 of 2"):
        OCRReward()([BLANK, empty], *asked("42", "42"))
