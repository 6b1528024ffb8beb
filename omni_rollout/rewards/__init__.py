"""Rewards: one file each, found by its name or brought along, summed with weights."""

from __future__ import annotations

from omni_rollout.rewards.base.contract import Reward, RewardBatch, RewardError
from omni_rollout.rewards.base.meanwhile import Meanwhile
from omni_rollout.rewards.base.sum import WeightedSum, get_reward, make_rewards

__all__ = ["Meanwhile", "Reward", "RewardBatch", "RewardError", "WeightedSum", "get_reward", "make_rewards"]
