"""Qwen-Image-Edit with random weights."""

from pathlib import Path
from typing import Any

from omni_rollout.models.qwen_image_edit.spec import TEMPLATE, TEMPLATE_PREFIX_TOKENS
from omni_rollout.nano.random_weights.qwen_image import parts
from omni_rollout.nano.random_weights.with_processor import save
from omni_rollout.nano.tokenizer import make_tokenizer


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "joint_dim": joint_dim}
    build_edit(out, "QwenImageEditPipeline", sizes, seed)


def build_edit(out: Path, pipeline: str, sizes: dict[str, int], seed: int, **own: Any) -> None:
    """`own`: switches of the transformer."""
    tokenizer = make_tokenizer(TEMPLATE.format("{}", "Picture 1: Picture 2: Picture 3: "), TEMPLATE_PREFIX_TOKENS)
    save(out, pipeline, parts(tokenizer, sizes, seed, **own))
