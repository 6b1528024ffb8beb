"""What a reward is, how one is found by name, and their weighted sum.

A new reward is a new file in this folder, named like the reward, with a function `make(threads: int) -> Reward`.
"""

from __future__ import annotations

import difflib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean
from typing import Protocol

import numpy as np

from omni_rollout.errors import UserError
from omni_rollout.types import KINDS, Kind, Prompt

SHAPES: dict[Kind, str] = {"image": "[H, W, 3]", "video": "[F, H, W, 3]", "layers": "[L, H, W, 4]"}


class RewardError(RuntimeError):
    """A reward that could not score an image; names the reward and the image."""


class Reward(Protocol):
    """Scores images, videos or layers. Higher is better."""

    name: str
    kinds: frozenset[Kind]  # of media that it can score

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for a prompt this reward cannot score; called before any image is sampled."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[float]:
        """One finite number a sample. `images` are media of one of `kinds`, as `Trajectory.media` says, of any sizes."""
        ...

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, float]:
        """Means over at least one image, for people: metric name -> value. May be slower and stricter than the reward."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """The rewards of one batch of images."""

    total: list[float]  # one an image
    breakdown: dict[str, list[float]]  # reward name -> one an image, before its weight


def get_reward(name: str, threads: int = 1) -> Reward:
    """The reward in `omni_rollout/rewards/<name>.py`, which may use `threads` CPU threads.

    Raises:
        UserError: no such reward, or fewer than one thread.
    """
    package = __package__ or "omni_rollout.rewards"
    known = sorted(module.name for module in pkgutil.iter_modules(import_module(package).__path__) if module.name != "base")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"reward {name!r} is unknown; did you mean {near[0]!r}? Known: {', '.join(known)}")
    if threads < 1:
        raise UserError(f"reward.threads={threads}: expected at least 1")
    return import_module(f"{package}.{name}").make(threads)


class WeightedSum:
    """Sum of named rewards times their weights, with each one kept for the metrics."""

    def __init__(self, weights: Mapping[str, float], threads: int = 1) -> None:
        if not weights:
            raise UserError("reward.weights is empty: expected at least one `name: weight`")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise UserError(f"reward.weights.{name}={weight}: expected a finite number")
        self.weights = dict(weights)
        self.rewards = {name: get_reward(name, threads) for name in weights}

    def check(self, prompts: Sequence[Prompt], kind: Kind) -> None:
        """Raises UserError where a reward cannot score what the model makes, or a prompt; before anything is sampled."""
        for name, reward in self.rewards.items():
            if kind not in reward.kinds:
                raise UserError(f"reward {name} scores {' and '.join(sorted(reward.kinds))}, this model makes {kind}")
            reward.check(prompts)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> RewardBatch:
        breakdown = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        total = [0.0] * len(images)
        for name, values in breakdown.items():
            total = [sum_ + self.weights[name] * value for sum_, value in zip(total, values, strict=True)]
        return RewardBatch(total=total, breakdown=breakdown)

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, float]:
        """The evaluation metrics of all rewards, side by side."""
        return {key: value for reward in self.rewards.values() for key, value in reward.evaluate(images, prompts).items()}


class EachAlone:
    """A reward that is a function of one media and its prompt."""

    def __init__(self, name: str, kind: Kind, score: Callable[[np.ndarray, Prompt], float]) -> None:
        self.name, self._score = name, score
        self._kind: Kind = kind
        self.kinds: frozenset[Kind] = frozenset({kind})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[float]:
        return score_each(self.name, images, prompts, self._score, self._kind)

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, float]:
        return {self.name: fmean(self(images, prompts))}


def score_each(
    name: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[Prompt],
    score: Callable[[np.ndarray, Prompt], float],
    kind: Kind = "image",
) -> list[float]:
    """`score` of every image, each media of `kind`.

    Raises:
        RewardError: from whatever `score` raised, or for a score that is not finite: which image, and of which prompt.
        ValueError: as many prompts as images are expected, and images as uint8 [H, W, 3], or as `kind` has it.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} images and {len(prompts)} prompts; expected one prompt an image")
    for index, image in enumerate(images):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or KINDS.get((image.ndim, image.shape[-1])) != kind:
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"{name}: image {index} is {found}; expected a uint8 array {SHAPES[kind]}")
    values = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        where = f"{name}: image {index} of {len(images)}, prompt {prompt.text!r}"
        try:
            value = float(score(image, prompt))
        except Exception as error:
            raise RewardError(f"{where}: {error}") from error
        if not math.isfinite(value):
            raise RewardError(f"{where}: the reward is {value}, expected a finite number")
        values.append(value)
    return values
