"""Held-out images: deterministic (ode), from fixed seeds, and what the rewards say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from omni_rollout.trajectories.sheet import CaptionedImage

PREFIX = "evaluation/"


def evaluation_metrics(rewards: Sequence[float], own: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one evaluation.

    Args:
        rewards: one an image, as training sums them.
        own: what the rewards' own `evaluate` gave.
    """
    return {
        **{f"{PREFIX}{key}": value for key, value in own.items()},
        f"{PREFIX}reward": fmean(rewards),
        f"{PREFIX}reward_se": stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else 0.0,
    }


def captioned(rewards: Sequence[float], texts: Sequence[str], media: Sequence[np.ndarray]) -> list[CaptionedImage]:
    """Images below which their reward and prompt are written."""
    return [(f"{reward:.2f} {text}", image) for reward, text, image in zip(rewards, texts, media, strict=True)]
