"""How well an image fits its prompt: max(100 * cosine, 0) of CLIP's embeddings.

Source: CLIPScore, arXiv 2104.08718, in the scale of torchmetrics.
"""

from __future__ import annotations

from omni_rollout.rewards.base.contract import Reward

MODEL = "openai/clip-vit-large-patch14"


def make(threads: int, model: str = MODEL) -> Reward:
    from omni_rollout.rewards.base.clip import CosineReward

    return CosineReward("clip_score", model, scale=100.0, least=0.0)
