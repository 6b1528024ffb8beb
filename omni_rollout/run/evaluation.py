"""Held-out images: deterministic (ode), from fixed seeds, and what the rewards say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from omni_rollout.trajectories.sheet import CaptionedImage

PREFIX = "evaluation/"


def evaluation_metrics(rewards: Sequence[float | None], own: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one evaluation.

    Args:
        rewards: one an image, as training sums them; None: it could not be scored.
        own: what the rewards' own `evaluate` gave.
    """
    metrics = {f"{PREFIX}{key}": value for key, value in own.items()}
    scored = [reward for reward in rewards if reward is not None]
    if not scored:
        return metrics
    error = stdev(scored) / math.sqrt(len(scored)) if len(scored) > 1 else 0.0
    return {**metrics, f"{PREFIX}reward": fmean(scored), f"{PREFIX}reward_se": error}


def captioned(rewards: Sequence[float | None], texts: Sequence[str], media: Sequence[np.ndarray]) -> list[CaptionedImage]:
    """Images below which their reward and prompt are written."""
    words = ["no reward" if reward is None else f"{reward:.2f}" for reward in rewards]
    return [(f"{word} {text}", image) for word, text, image in zip(words, texts, media, strict=True)]
