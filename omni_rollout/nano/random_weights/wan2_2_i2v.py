"""Wan2.2's image to video with random weights: its transformers read the condition too."""

from pathlib import Path

from diffusers import WanImageToVideoPipeline

from omni_rollout.models.wan2_2_i2v.spec import IN_CHANNELS, RULES
from omni_rollout.nano.random_weights.wan2_2 import components, save


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    parts = components(layers, heads, head_dim, joint_dim, seed, in_channels=IN_CHANNELS)
    save(WanImageToVideoPipeline, parts, RULES.extra["boundary_ratio"].default, out)
