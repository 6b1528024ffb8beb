"""Held-out images: deterministic (ode), from fixed seeds, and what the rewards say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from omni_rollout.rewards import RewardBatch, WeightedSum
from omni_rollout.trajectories.sheet import CaptionedImage
from omni_rollout.types import Prompt

PREFIX = "evaluation/"
NAMED = 5  # failures


def evaluated(
    rewards: WeightedSum, media: Sequence[np.ndarray], prompts: Sequence[Prompt], batch: RewardBatch
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of one evaluation; and as the note `rewards/not_measured` what could not be measured, five at most.

    Args:
        batch: the images' rewards, as training has them.
    """
    own, failures = rewards.evaluate(media, prompts, batch)
    return evaluation_metrics(batch.total, own), {"rewards/not_measured": "; ".join(failures[:NAMED])} if failures else {}


def evaluation_metrics(rewards: Sequence[float | None], own: Mapping[str, float]) -> dict[str, float]:
    """Metrics of one evaluation.

    Args:
        rewards: one an image, as training sums them; None could not be scored, and without any there is no mean.
        own: what the rewards' own `evaluate` gave.
    """
    metrics = {f"{PREFIX}{key}": value for key, value in own.items()}
    scored = [reward for reward in rewards if reward is not None]
    if scored:
        metrics[f"{PREFIX}reward"] = fmean(scored)
        metrics[f"{PREFIX}reward_se"] = stdev(scored) / math.sqrt(len(scored)) if len(scored) > 1 else 0.0
    return metrics


def captioned(rewards: Sequence[float | None], texts: Sequence[str], media: Sequence[np.ndarray]) -> list[CaptionedImage]:
    """Images below which their reward and prompt are written."""
    told = ["not scored" if reward is None else f"{reward:.2f}" for reward in rewards]
    return [(f"{reward} {text}", image) for reward, text, image in zip(told, texts, media, strict=True)]
