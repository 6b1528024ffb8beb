"""Wan2.2 with random weights: two experts, which differ."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from omni_rollout.errors import UserError
from omni_rollout.models.wan2_2.checkpoint import shared_alike
from omni_rollout.models.wan2_2.spec import IN_CHANNELS, LATENT_CHANNELS, RULES
from omni_rollout.nano.random_weights.randomize import randomize

WORDS = (
    "a the of and on with that says photo video digit number word sign table cat dog two sitting "
    "red green blue yellow white black moving left right up down"
)
FREQUENCIES = 64  # of the sinusoid of time


def build(out: Path, *, layers: int, heads: int, head_dim: int, joint_dim: int, seed: int) -> None:
    """See `build_random`."""
    parts = components(layers, heads, head_dim, joint_dim, seed, in_channels=IN_CHANNELS)
    save(WanPipeline, parts, RULES.extra["boundary_ratio"].default, out)


def components(layers: int, heads: int, head_dim: int, joint_dim: int, seed: int, *, in_channels: int) -> dict[str, Any]:
    """By their names in the checkpoint.

    Raises:
        UserError: a head_dim that diffusers and the engine share out differently among time, height and width.
    """
    if head_dim < 12 or head_dim % 2 or not shared_alike(head_dim):
        raise UserError(f"head_dim={head_dim}: Wan2.2 expects 12, 14, 18, 20, 24, 26 and so on, such as 24, 32 or 128")
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    width = heads * head_dim
    with torch.random.fork_rng(devices=[]):  # what the constructors draw is drawn anew
        made: dict[str, Any] = {
            "text_encoder": make_text_encoder(len(tokenizer), joint_dim),
            "vae": make_vae(),
            **{
                name: WanTransformer3DModel(
                    num_attention_heads=heads,
                    attention_head_dim=head_dim,
                    in_channels=in_channels,
                    out_channels=LATENT_CHANNELS,
                    text_dim=joint_dim,
                    freq_dim=FREQUENCIES,
                    ffn_dim=27 * width // 10,  # as published, 13824 of 5120; of small widths an odd number
                    num_layers=layers,
                )
                for name in ("transformer", "transformer_2")
            },
        }
    for module in made.values():
        randomize(module, generator)
    made["vae"].register_to_config(
        latents_mean=(0.1 * torch.randn(LATENT_CHANNELS, generator=generator)).tolist(),
        latents_std=(0.8 + 0.4 * torch.rand(LATENT_CHANNELS, generator=generator)).tolist(),
    )
    return {**made, "tokenizer": tokenizer, "scheduler": make_scheduler()}


def save(pipeline: type[DiffusionPipeline], parts: dict[str, Any], boundary_ratio: float, out: Path) -> None:
    make: Any = pipeline
    make(**parts, boundary_ratio=boundary_ratio).save_pretrained(out)


def make_tokenizer() -> T5Tokenizer:
    """Unigrams: the words above, each after a space, and every printable character for all else."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0)]
    words = [(f"\u2581{word}", -1.0) for word in WORDS.split()]
    characters = [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    vocabulary: Any = [*special, *words, *characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def make_text_encoder(vocabulary: int, hidden_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary, d_model=hidden_size, d_kv=hidden_size // 4, d_ff=2 * hidden_size, num_layers=2, num_heads=4
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def make_vae() -> AutoencoderKLWan:
    """One residual block per level, the real model's three downsamplings, two of them in time too."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def make_scheduler() -> UniPCMultistepScheduler:
    """As the published checkpoints have it. Their sampler; the rollout takes its own steps."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
