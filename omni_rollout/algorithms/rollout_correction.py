"""Rollout correction: weights and rejections for trajectories that another program sampled than the one that is trained.

Names, statistics and bounds as in verl 0.9.1 (`rollout_corr_helper`): a denoising step stands for its token, a trajectory for
its sequence. With log ratio l = old log-prob - the rollout's: k1 = -l, k2 = l^2 / 2, k3 = exp(l) - 1 - l.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

LEVELS = ("token", "sequence")
REJECTIONS = (
    *(f"{level}_{estimate}" for level in ("token", "seq_sum", "seq_mean") for estimate in ("k1", "k2", "k3")),
    "seq_max_k2",
    "seq_max_k3",
)
BOUND = 20.0  # of a log ratio, so that exp stays finite


class Keys(Protocol):
    rollout_is: str | None
    rollout_is_threshold: str
    rollout_rs: str | None
    rollout_rs_threshold: str


def problems(keys: Keys) -> Iterator[str]:
    for key, value, known in (("rollout_is", keys.rollout_is, LEVELS), ("rollout_rs", keys.rollout_rs, REJECTIONS)):
        if value is None:
            continue
        if value not in known:
            yield f"algorithm.{key}={value}: expected null, or one of {', '.join(known)}"
            continue
        threshold = getattr(keys, f"{key}_threshold")
        two = key == "rollout_is" or value.endswith("k1")
        try:
            lower, upper = bounds(threshold)
            fits = upper > 0 and (lower is None or (two and 0 < lower <= upper))
        except ValueError:
            fits = False
        if not fits:
            form = 'a number above 0, or two as "0.5_2.0"' if two else "one number above 0"
            yield f"algorithm.{key}_threshold={threshold}: expected {form}"


def bounds(threshold: str) -> tuple[float | None, float]:
    """(lower or None, upper)."""
    lower, between, upper = str(threshold).partition("_")
    return (float(lower), float(upper)) if between else (None, float(lower))


def weights(keys: Keys, rollout: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """[T] fp32, of the steps of one trajectory; 1 without `rollout_is`.

    Args:
        rollout, old: [T] log-probs, by the rollout and by the trainer before its update.
    """
    ratio = (old.double() - rollout.double()).clamp(-BOUND, BOUND)
    if keys.rollout_is is None:
        return ratio.new_ones(ratio.shape).float()
    if keys.rollout_is == "sequence":
        ratio = (old.double() - rollout.double()).sum().clamp(-BOUND, BOUND).expand(ratio.shape)
    weight = ratio.exp()
    lower, upper = bounds(keys.rollout_is_threshold)
    if lower is None:
        return weight.clamp(max=upper).float()
    return weight.where((weight >= lower) & (weight <= upper), weight.new_zeros(())).float()


def kept(keys: Keys, rollout: torch.Tensor, old: torch.Tensor) -> list[bool]:
    """[T]: which steps of one trajectory are learned from; all without `rollout_rs`."""
    if keys.rollout_rs is None:
        return [True] * len(rollout)
    ratio = (old.double() - rollout.double()).clamp(-BOUND, BOUND)
    level, _, estimate = keys.rollout_rs.rpartition("_")
    values = {"k1": -ratio, "k2": 0.5 * ratio**2, "k3": ratio.exp() - 1 - ratio}[estimate]
    if level != "token":
        reduced = {"seq_sum": values.sum, "seq_mean": values.mean, "seq_max": values.max}[level]()
        values = reduced.expand(ratio.shape)
    lower, upper = bounds(keys.rollout_rs_threshold)
    if estimate == "k1":
        return ((values >= math.log(lower or 1 / upper)) & (values <= math.log(upper))).tolist()
    return (values <= upper).tolist()
