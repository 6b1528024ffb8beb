"""Training the nano transformer by flow matching on cached latents of rendered signs."""

import copy
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from rich.progress import track

from omni_rollout.nano import render
from omni_rollout.nano.components import LATENT_CHANNELS, PATCH_SIZE, VAE_SCALE
from omni_rollout.nano.tokenizer import PROMPT_WIDTH
from omni_rollout.nano.vae import encode_frame, latent_scale, single_frame_path, to_pixels

logger = logging.getLogger(__name__)

GRID = render.IMAGE_SIZE // VAE_SCALE // PATCH_SIZE
"""Image tokens along height and along width."""


@dataclass(frozen=True)
class TrainingSettings:
    """What any supervised training of a nano transformer is told."""

    batch: int = 64
    max_steps: int = 4000
    cosine_steps: int = 4600
    """Length of the learning rate's cosine. Longer than training, so that the shipped state is one still learning."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema_decay: float = 0.998
    evaluate_from: int = 800
    evaluate_every: int = 100
    evaluation_images: int = 120
    window: tuple[float, float] = (0.40, 0.60)
    """Share of held-out images done right, without guidance, of the state to ship: good enough to learn by reward, far from
    done. Training ends at the first state that reads inside it twice."""
    second_look_images: int = 240


@dataclass(frozen=True)
class TransformerSettings(TrainingSettings):
    layers: int = 4
    heads: int = 4
    head_dim: int = 48
    joint_dim: int = 64
    images: int = 20_000
    prompt_drop: float = 0.1
    """Share of samples trained on the prompt " ", which guidance uses as its negative."""


@dataclass(frozen=True)
class Dataset:
    """Everything the transformer reads, computed once."""

    latents: torch.Tensor
    """float32 [images, GRID * GRID, 64]: packed, normalised posterior means."""
    prompt: torch.Tensor
    """int64 [images]: row of the image's prompt in `prompt_embeds`."""
    prompt_embeds: torch.Tensor
    """float32 [prompts + 1, PROMPT_WIDTH, joint_dim]; the last row is the dropped prompt " "."""
    prompt_embeds_mask: torch.Tensor
    """bool [prompts + 1, PROMPT_WIDTH]: True where a token is."""


@torch.no_grad()
def embed_prompts(pipeline: QwenImagePipeline, prompts: list[str], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own prompt embeddings, padded on the right to `width`, and their bool mask.

    Raises ValueError if a prompt is longer than `width` tokens.
    """
    embeds, mask = pipeline.encode_prompt(prompts, device=torch.device("cpu"))
    missing = width - embeds.shape[1]
    if missing < 0:
        raise ValueError(f"the longest of {len(prompts)} prompts takes {embeds.shape[1]} tokens, more than the width {width}")
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask  # None is the pipeline's "all tokens are real"
    pad = torch.nn.functional.pad
    return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing)).bool()


@torch.no_grad()
def _encode_signs(vae: AutoencoderKLQwenImage, signs: list[render.Sign]) -> torch.Tensor:
    """Packed latents [len(signs), GRID * GRID, 64], normalised as the transformer sees them."""
    mean, std = latent_scale(vae)
    side = GRID * PATCH_SIZE
    packed = []
    with single_frame_path(vae):
        for start in track(range(0, len(signs), 64), description="latents"):
            part = signs[start : start + 64]
            latents = (encode_frame(vae, to_pixels([render.draw(sign) for sign in part]))[0] - mean) / std
            packed.append(QwenImagePipeline._pack_latents(latents, len(part), LATENT_CHANNELS, side, side))
    return torch.cat(packed)


def make_dataset(pipeline: QwenImagePipeline, images: int, seed: int) -> Dataset:
    rng = random.Random(f"transformer {seed}")
    colors = list(render.COLORS)
    signs = [render.sample_sign(rng, render.sample_text(rng), rng.choice(colors)) for _ in range(images)]
    prompts = [render.prompt_for(sign.text, sign.color) for sign in signs]
    row = {prompt: index for index, prompt in enumerate(sorted(set(prompts)))}
    embeds, mask = embed_prompts(pipeline, [*row, " "], PROMPT_WIDTH)
    return Dataset(
        latents=_encode_signs(pipeline.vae, signs),
        prompt=torch.tensor([row[prompt] for prompt in prompts]),
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
    )


def learning_rate(settings: TrainingSettings, step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.cosine_steps)))
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * (0.95 * cosine + 0.05)


def flow_matching(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    generator: torch.Generator,
    sigma_of: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid,
) -> torch.Tensor:
    """Mean squared error of the velocity (noise - latents), each at a sigma of its own.

    Args:
        velocity: what a network says to noisy latents [B, ...] at sigmas [B].
        sigma_of: makes sigmas of numbers drawn from N(0, 1).
    """
    noise = torch.randn(latents.shape, generator=generator)
    sigma = sigma_of(torch.randn(len(latents), generator=generator))
    noisy = torch.lerp(latents, noise, sigma.view(-1, *[1] * (latents.dim() - 1)))
    with torch.autocast("cpu", torch.bfloat16):
        predicted = velocity(noisy, sigma)
    return (predicted.float() - (noise - latents)).square().mean()


def flow_matching_loss(
    transformer: QwenImageTransformer2DModel, data: Dataset, settings: TransformerSettings, generator: torch.Generator
) -> torch.Tensor:
    """Of one random batch, a share of it without its prompt."""
    size = settings.batch
    rows = torch.randint(len(data.latents), (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < settings.prompt_drop
    prompt = torch.where(dropped, len(data.prompt_embeds) - 1, data.prompt[rows])

    def velocity(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return transformer(
            hidden_states=noisy,
            encoder_hidden_states=data.prompt_embeds[prompt],
            encoder_hidden_states_mask=data.prompt_embeds_mask[prompt],
            timestep=sigma,
            img_shapes=[[(1, GRID, GRID)]] * size,
            return_dict=False,
        )[0]

    return flow_matching(velocity, data.latents[rows], generator)


def train_transformer(
    transformer: torch.nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    settings: TrainingSettings,
    seed: int,
    keep: Callable[[int, Any], bool],
) -> None:
    """Train in place.

    Args:
        transformer: one, or a model's experts together.
        loss_of: the loss on one batch that the generator draws.
        keep: every evaluation calls `keep(step, averaged)` with the averaged weights; True ends the training.
    """
    generator = torch.Generator().manual_seed(seed)
    averaged = copy.deepcopy(transformer).eval().requires_grad_(False)
    weights: list[torch.Tensor] = list(transformer.parameters())
    averages: list[torch.Tensor] = list(averaged.parameters())
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    recent = 0.0
    for step in track(range(1, settings.max_steps + 1), description="transformer"):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step - 1)
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(settings.ema_decay, step / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        recent += loss.item()
        if step % 100 == 0:
            logger.info("transformer step %d: loss %.4f", step, recent / 100)
            recent = 0.0
        due = step >= settings.evaluate_from and step % settings.evaluate_every == 0
        if due and keep(step, averaged):
            return
