"""Which image people prefer for a prompt: HPSv2 (arXiv 2306.09341), the cosine of a CLIP-H tuned on their choices.

Published as weights of open_clip: give `reward.model.hpsv2` a folder with them in the layout of `transformers.CLIPModel`.
"""

from __future__ import annotations

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Reward


def make(threads: int, model: str | None = None) -> Reward:
    from omni_rollout.rewards.base.clip import CosineReward

    if model is None:
        raise UserError("reward hpsv2: give reward.model.hpsv2=FOLDER, its weights in the layout of transformers' CLIPModel")
    return CosineReward("hpsv2", model, scale=1.0)
