"""What a reward is: `fn(images, prompts, metadata) -> list[float | None]`, plain or async; a function, or an object with one.

A new reward of this package is a file in `omni_rollout/rewards/`, named like the reward, with `make(threads: int) -> Reward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from omni_rollout.errors import RunFailedError
from omni_rollout.types import KINDS, InputImage, Kind, Prompt, Trajectory

SHAPES: dict[Kind, str] = {"image": "[H, W, 3]", "video": "[F, H, W, 3]", "layers": "[L, H, W, 4]"}

Columns = Mapping[str, Any]
"""What a prompt brings beside its text: every column of its file, and as `images` those that it speaks of (`InputImage` as a
dictionary). JSON types only."""


class RewardError(RunFailedError):
    """Images that could not be scored; names the reward and the image."""


class Reward(Protocol):
    """Scores images, videos or layers. Higher is better.

    These attributes are optional:

    - `kinds: frozenset[Kind]`: the media it can score; all, if it does not say.
    - `check(prompts, metadata)`: raises UserError for a prompt it cannot score; called before any image is sampled.
    - `evaluate(images, prompts, metadata) -> dict[str, float]`: metric -> mean over at least one image, for people, the
      reward's own name among them. May be slower and stricter than the reward. Without it: the mean of its scores.
    """

    def __call__(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]
    ) -> Sequence[float | Exception | None]:
        """One number a sample; what is None, NaN or an exception is a sample that could not be scored.

        Args:
            images: media of one of `kinds`, as `Trajectory.media` says, of any sizes.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """The rewards of one batch of images. None: this image could not be scored."""

    total: list[float | None]  # one an image: the weighted sum
    breakdown: dict[str, list[float | None]]  # reward name -> one an image, before its weight; empty: none was asked
    failures: list[str]  # a sentence for every image and reward that failed

    @property
    def scored(self) -> list[int]:
        """The places of the images that have a reward."""
        return [row for row, value in enumerate(self.total) if value is not None]

    def of(self, rows: Sequence[int]) -> Scores:
        """Those of scored images."""
        return Scores(
            total=[_number(self.total[row]) for row in rows],
            breakdown={name: [_number(values[row]) for row in rows] for name, values in self.breakdown.items()},
        )


def preferences(group: Sequence[Trajectory]) -> RewardBatch:
    """Of a data set's images: 1 for the best of its row, 0 for the others. No reward is asked."""
    return RewardBatch(total=[float(one.member == 0) for one in group], breakdown={}, failures=[])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of images that all have one."""

    total: list[float]
    breakdown: dict[str, list[float]]


def _number(value: float | None) -> float:
    assert value is not None, "asked for the reward of an image that has none"
    return value


def texts_and_columns(prompts: Sequence[Prompt]) -> tuple[list[str], list[Columns]]:
    """What a reward is told of prompts."""
    return [prompt.text for prompt in prompts], [columns_of(prompt) for prompt in prompts]


def columns_of(prompt: Prompt) -> Columns:
    images = [asdict(image) for image in prompt.images]
    return {**prompt.metadata, "images": images} if images else dict(prompt.metadata)


def input_images(columns: Columns) -> tuple[InputImage, ...]:
    """The images that a prompt speaks of, out of its columns."""
    return tuple(InputImage(**image) for image in columns.get("images", ()))


class EachAlone:
    """A reward that is a function of one media, its prompt and its columns."""

    def __init__(self, name: str, kind: Kind, score: Callable[[np.ndarray, str, Columns], float]) -> None:
        self.name, self._score = name, score
        self._kind: Kind = kind
        self.kinds: frozenset[Kind] = frozenset({kind})

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        return score_each(self.name, images, prompts, metadata, self._score, self._kind)

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        return {self.name: fmean(self(images, prompts, metadata))}


def score_each(
    name: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[Columns],
    score: Callable[[np.ndarray, str, Columns], float],
    kind: Kind = "image",
) -> list[float]:
    """`score` of every image, each media of `kind`.

    Raises:
        RewardError: from whatever `score` raised, or for a score that is not finite: which image, and of which prompt.
        ValueError: as many prompts and metadata as images are expected, and images as uint8 [H, W, 3], or as `kind` has it.
    """
    check_media(name, images, prompts, kind)
    values = []
    for index, (image, prompt, columns) in enumerate(zip(images, prompts, metadata, strict=True)):
        where = f"{name}: image {index} of {len(images)}, prompt {prompt!r}"
        try:
            value = float(score(image, prompt, columns))
        except Exception as error:
            raise RewardError(f"{where}: {error}") from error
        if not math.isfinite(value):
            raise RewardError(f"{where}: the reward is {value}, expected a finite number")
        values.append(value)
    return values


def check_media(name: str, images: Sequence[np.ndarray], prompts: Sequence[str], kind: Kind = "image") -> None:
    """Raises ValueError, see `score_each`."""
    if len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} images and {len(prompts)} prompts; expected one prompt an image")
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or KINDS.get((image.ndim, image.shape[-1])) != kind:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"{name}: image {index} is {found}; expected a uint8 array {SHAPES[kind]}")
