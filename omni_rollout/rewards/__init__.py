"""Rewards: one file each, found by its name, summed with weights."""

from __future__ import annotations

from omni_rollout.rewards.base import Reward, RewardBatch, RewardError, WeightedSum, get_reward

__all__ = ["Reward", "RewardBatch", "RewardError", "WeightedSum", "get_reward"]
