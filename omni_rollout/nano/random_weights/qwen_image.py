"""Qwen-Image with random weights."""

from pathlib import Path

import torch
from diffusers import QwenImagePipeline

from omni_rollout.nano.components import LATENT_CHANNELS, make_scheduler, make_text_encoder, make_transformer, make_vae
from omni_rollout.nano.random_weights.randomize import randomize
from omni_rollout.nano.tokenizer import make_tokenizer


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer, hidden_size=joint_dim, seed=seed)
    transformer = make_transformer(layers=layers, heads=heads, head_dim=head_dim, joint_dim=joint_dim)
    vae = make_vae(base_dim=8, dim_mult=(1, 2, 4, 4))
    for module in (text_encoder, transformer, vae):
        randomize(module, generator)
    vae.register_to_config(
        latents_mean=(0.1 * torch.randn(LATENT_CHANNELS, generator=generator)).tolist(),
        latents_std=(0.8 + 0.4 * torch.rand(LATENT_CHANNELS, generator=generator)).tolist(),
    )
    QwenImagePipeline(
        scheduler=make_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    ).save_pretrained(out)
