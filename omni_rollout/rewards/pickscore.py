"""Which image people prefer for a prompt: PickScore (arXiv 2305.01569), a CLIP-H tuned on their choices.

The score is exp(logit_scale) * cosine.

flow_grpo divides it by 26; a weight does the same. The folder needs CLIP-H's tokenizer and image processor beside the weights.
"""

from __future__ import annotations

from omni_rollout.rewards.base.contract import Reward

MODEL = "yuvalkirstain/PickScore_v1"


def make(threads: int, model: str = MODEL) -> Reward:
    from omni_rollout.rewards.base.clip import CosineReward

    return CosineReward("pickscore", model, scale=None)
