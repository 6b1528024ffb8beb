"""How well the text in an image can be read: the OCR task of Flow-GRPO (arXiv 2505.05470), with RapidOCR as the reader.

The reward is 1 - min(edit distance, length) / length, between what is read and the wanted text, both in lower case and
without spaces. One difference to the published code (`flow_grpo/ocr.py`, `OcrScorer`), whose form is `ocr_inside`: there, an
image that holds the wanted text among other text scores 1; here everything else that is read counts against it, or "421" would
be a perfect "42".
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, score_each
from omni_rollout.types import Kind

DETECTION_ABOVE = 128
"""Pixels of the short side: up to here the image is taken as one line of text; above, lines are searched for first.
The recogniser looks at 48 pixels of height, so a small image loses nothing; the detector scales it up to 736 pixels and
takes ten times as long as the reading."""

NARROW_ASPECT = 2.0
"""The recogniser pads every line to an aspect of 320 / 48; lines up to this one fit 96 / 48 and take half the time."""

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class OCRReward:
    """Needs the wanted text of every prompt: its metadata `text`, else what stands between double quotes."""

    name = "ocr"
    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.similarity = similarity  # of what is read and what is wanted

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            target_text(prompt, columns)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        self.check(prompts, metadata)
        return self._similarities(images, prompts, metadata, narrow=True)

    def read(self, images: Sequence[np.ndarray]) -> list[str]:
        """What RapidOCR reads with its own settings: for evaluation, slower than the reward's reading and independent of it."""
        return [_read(image, self.threads, narrow=False) for image in images]

    def exact_match(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[bool]:
        """Whether `read` gives the wanted text, case and spaces aside."""
        return [similarity == 1 for similarity in self._similarities(images, prompts, metadata, narrow=False)]

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        """`exact_match` and the mean reward, both with RapidOCR's own settings."""
        similarities = self._similarities(images, prompts, metadata, narrow=False)
        return {"exact_match": fmean(similarity == 1 for similarity in similarities), self.name: fmean(similarities)}

    def _similarities(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns], *, narrow: bool
    ) -> list[float]:
        def score(image: np.ndarray, prompt: str, columns: Columns) -> float:
            return self.similarity(_read(image, self.threads, narrow=narrow), target_text(prompt, columns))

        return score_each(self.name, images, prompts, metadata, score)


def make(threads: int) -> OCRReward:
    missing = [package for package in ("rapidocr", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise UserError(f"the ocr reward needs {' and '.join(missing)}: pip install 'omni_rollout[ocr]'")
    return OCRReward(threads)


def target_text(prompt: str, columns: Columns) -> str:
    """The text an image of this prompt should show.

    Raises:
        UserError: neither metadata `text` nor a quotation, or an empty one.
    """
    if "text" in columns:
        text, source = columns["text"], "metadata `text`"
    else:
        quoted = QUOTED.search(prompt)
        if quoted is None:
            raise UserError(
                f"ocr: prompt {prompt!r} names no text to read; give it metadata `text`, or put the text in double quotes"
            )
        text, source = quoted[1] or quoted[2] or "", "the quotation"
    if not isinstance(text, str) or not normalised(text):
        raise UserError(f"ocr: prompt {prompt!r}: {source} is {text!r}; expected a string with at least one character")
    return text


def similarity(read: str, wanted: str) -> float:
    """0 to 1, by edit distance relative to the length of what is wanted."""
    read, wanted = normalised(read), normalised(wanted)
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def similarity_inside(read: str, wanted: str) -> float:
    """1 where the wanted text stands anywhere in what is read; else as `similarity`."""
    return 1.0 if normalised(wanted) in normalised(read) else similarity(read, wanted)


def normalised(text: str) -> str:
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of single characters (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _read(image: np.ndarray, threads: int, *, narrow: bool) -> str:
    height, width = image.shape[:2]
    detect = min(height, width) > DETECTION_ABOVE
    engine = _engine(threads, narrow and not detect and width <= NARROW_ASPECT * height)
    bgr = np.ascontiguousarray(image[..., ::-1])
    return "".join(engine(bgr, use_det=detect, use_cls=False, use_rec=True).txts or ())


@functools.cache
def _engine(threads: int, narrow: bool) -> Any:
    from rapidocr import RapidOCR

    # RapidOCR ignores a number of threads above the machine's and takes every core then.
    threads = min(threads, os.cpu_count() or 1)
    params: dict[str, Any] = {
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": threads,
        "Global.log_level": "error",  # of RapidOCR's own logger only; an image without text is no news
    }
    if narrow:
        params["Rec.rec_img_shape"] = [3, 48, round(48 * NARROW_ASPECT)]
    return RapidOCR(params=params)
