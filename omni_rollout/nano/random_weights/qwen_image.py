"""Qwen-Image with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline

from omni_rollout.nano.components import LATENT_CHANNELS, make_scheduler, make_text_encoder, make_transformer, make_vae
from omni_rollout.nano.random_weights.randomize import randomize
from omni_rollout.nano.tokenizer import make_tokenizer


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "joint_dim": joint_dim}
    QwenImagePipeline(**parts(make_tokenizer(), sizes, seed)).save_pretrained(out)


def parts(tokenizer: Any, sizes: dict[str, int], seed: int, *, channels: int = 3, **own: Any) -> dict[str, Any]:
    """Components by name, for Qwen-Image and its relatives.

    Args:
        sizes: of the transformer, as `make_transformer` takes them.
        channels: of pictures.
        own: switches of the transformer.
    """
    generator = torch.Generator().manual_seed(seed)
    text_encoder = make_text_encoder(tokenizer, hidden_size=sizes["joint_dim"], seed=seed)
    transformer = make_transformer(**sizes, **own)
    vae = make_vae(base_dim=8, dim_mult=(1, 2, 4, 4), channels=channels)
    for module in (text_encoder, transformer, vae):
        randomize(module, generator)
    vae.register_to_config(
        latents_mean=(0.1 * torch.randn(LATENT_CHANNELS, generator=generator)).tolist(),
        latents_std=(0.8 + 0.4 * torch.rand(LATENT_CHANNELS, generator=generator)).tolist(),
    )
    return {
        "scheduler": make_scheduler(),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
