"""An untrained checkpoint of any size in diffusers layout, for tests and benchmarks."""

from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from torch import nn

from omni_rollout.errors import UserError
from omni_rollout.nano.components import (
    LATENT_CHANNELS,
    check_seed,
    make_scheduler,
    make_text_encoder,
    make_transformer,
    make_vae,
)
from omni_rollout.nano.tokenizer import make_tokenizer


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew so that none is degenerate and the output depends on all of them.

    Default initialisation leaves biases and norms at 0 and 1, which hides bugs that swap, drop or mix them up. Here norm
    weights become 1 +- 0.2, biases N(0, 0.1), matrices and kernels N(0, 1 / fan_in), embeddings N(0, 1).
    """
    for parent in module.modules():
        for name, parameter in parent.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(0.0, 0.1, generator=generator)
            elif isinstance(parent, nn.Embedding):
                parameter.normal_(generator=generator)
            elif parameter.dim() == 1 or name == "gamma":
                parameter.uniform_(0.8, 1.2, generator=generator)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)


def build_random(out: Path, *, layers: int = 2, heads: int = 4, head_dim: int = 32, joint_dim: int = 64, seed: int = 0) -> Path:
    """Write a complete float32 QwenImagePipeline checkpoint with random weights to `out` and return `out`.

    Args:
        layers: transformer blocks.
        heads: attention heads of the transformer; its width is heads * head_dim.
        head_dim: even, at least 8.
        joint_dim: width of the text encoder and of the prompt embeddings, a multiple of 32.
        seed: the same arguments and seed give the same bytes; 0 to 2**63 - 1.

    Raises:
        UserError: a number that is none of these.
    """
    for name, number in (("layers", layers), ("heads", heads)):
        if number < 1:
            raise UserError(f"{name}={number}: expected at least 1")
    check_seed(seed)
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
    return out
