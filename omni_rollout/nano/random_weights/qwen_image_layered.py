"""Qwen-Image-Layered with random weights."""

from pathlib import Path

from omni_rollout.nano.random_weights.qwen_image import parts
from omni_rollout.nano.random_weights.with_processor import save
from omni_rollout.nano.tokenizer import make_tokenizer


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "joint_dim": joint_dim}
    own = {"use_layer3d_rope": True, "use_additional_t_cond": True}
    save(out, "QwenImageLayeredPipeline", parts(make_tokenizer(), sizes, seed, channels=4, **own))
