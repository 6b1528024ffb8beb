"""The parts of a (nano) Qwen-Image checkpoint as untrained modules: the classes and settings of the real model, smaller."""

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from omni_rollout.errors import UserError

LATENT_CHANNELS = 16
PATCH_SIZE = 2
VAE_SCALE = 8
"""Pixels per latent position, along height and width."""

VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Entries of the text encoder's config -> tokens. Unused without an image input, but the class asks for them."""


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: expected 0 to 2**63 - 1")


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's channels over (frame, height, width): even parts, (16, 56, 56) at the real model's 128."""
    if head_dim < 8 or head_dim % 2:
        raise UserError(f"head_dim={head_dim}: expected an even number of at least 8, to split over three rotary axes")
    frame = max(4, head_dim // 8 // 2 * 2)
    side = (head_dim - frame) // 4 * 2
    return head_dim - 2 * side, side, side


def make_transformer(*, layers: int, heads: int, head_dim: int, joint_dim: int, **own: Any) -> QwenImageTransformer2DModel:
    """`own`: switches of the class that only some of Qwen-Image's relatives set."""
    return QwenImageTransformer2DModel(
        patch_size=PATCH_SIZE,
        in_channels=LATENT_CHANNELS * PATCH_SIZE**2,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=joint_dim,
        guidance_embeds=False,
        axes_dims_rope=rope_axes(head_dim),
        **own,
    )


def make_vae(*, base_dim: int, dim_mult: tuple[int, ...], channels: int = 3) -> AutoencoderKLQwenImage:
    """One residual block per level, the real model's three downsamplings; latents_mean 0 and latents_std 1 until measured.

    Four `channels`: pictures with alpha.
    """
    return AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=list(dim_mult),
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        input_channels=channels,
    )


def make_text_encoder(tokenizer: Qwen2Tokenizer, *, hidden_size: int, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two random layers with a vision tower of minimal size. It stays frozen: the transformer learns to read its embeddings."""
    heads = 4
    if hidden_size < 8 * heads or hidden_size % (8 * heads):
        raise UserError(f"joint_dim={hidden_size}: expected a multiple of {8 * heads} (4 heads, three rotary sections)")
    half_head = hidden_size // heads // 2
    side = 3 * half_head // 8
    vision_tokens: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    end_of_text = tokenizer.pad_token_id
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_theta": 1e6,
            "max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "default",
                "rope_type": "default",
                "mrope_section": [half_head - 2 * side, side, side],
            },
            "bos_token_id": end_of_text,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": end_of_text,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
        },
        **vision_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The released Qwen-Image scheduler's settings: dynamic exponential shift, last sigma before zero at 0.02."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        invert_sigmas=False,
        shift_terminal=0.02,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        time_shift_type="exponential",
        stochastic_sampling=False,
    )
