"""The OCR reward as Flow-GRPO published it: an image that holds the wanted text among other text scores 1; see `ocr`."""

from __future__ import annotations

from omni_rollout.rewards import ocr
from omni_rollout.rewards.base.contract import Reward


def make(threads: int) -> Reward:
    reward = ocr.make(threads)
    reward.name, reward.similarity = "ocr_inside", ocr.similarity_inside
    return reward
