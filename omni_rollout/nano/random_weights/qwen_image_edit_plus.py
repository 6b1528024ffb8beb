"""Qwen-Image-Edit-Plus with random weights."""

from pathlib import Path

from omni_rollout.nano.random_weights.qwen_image_edit import build_edit


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int, zero_cond_t: bool = True) -> None:
    """See `build_random`. `zero_cond_t`: as the checkpoint of 2511 has it; that of 2509 has not."""
    sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "joint_dim": joint_dim}
    build_edit(out, "QwenImageEditPlusPipeline", sizes, seed, zero_cond_t=zero_cond_t)
