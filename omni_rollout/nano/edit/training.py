"""Training the nano Qwen-Image-Edit's transformer by flow matching on cached latents of rendered pairs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel
from PIL import Image
from rich.progress import track

from omni_rollout.nano import render
from omni_rollout.nano.components import LATENT_CHANNELS, PATCH_SIZE
from omni_rollout.nano.edit.pairs import Edit, pictures, sample_edits
from omni_rollout.nano.transformer import GRID, TrainingSettings, flow_matching
from omni_rollout.nano.vae import encode_frame, latent_scale, single_frame_path, to_pixels

logger = logging.getLogger(__name__)

PROMPT_WIDTH = 16
"""Fixed width in tokens of the recipe's prompts: four of the picture, the instruction, and the template's around them."""
PART = 64
"""Pairs that are encoded at a time."""


@dataclass(frozen=True)
class EditSettings(TrainingSettings):
    pairs: int = 10_000
    batch: int = 32
    max_steps: int = 2000
    cosine_steps: int = 2300
    learning_rate: float = 5e-4
    evaluate_from: int = 100
    evaluate_every: int = 50


@dataclass(frozen=True)
class Encoded:
    """What the transformer is told of some edits."""

    image_latents: torch.Tensor
    """float32 [edits, GRID * GRID, 64]: packed, normalised posterior means of the sources."""
    prompt_embeds: torch.Tensor
    """float32 [edits, PROMPT_WIDTH, joint_dim]."""
    prompt_embeds_mask: torch.Tensor
    """bool [edits, PROMPT_WIDTH]: True where a token is."""


@dataclass(frozen=True)
class Pairs:
    told: Encoded
    latents: torch.Tensor
    """float32 [edits, GRID * GRID, 64]: of the targets."""


@torch.no_grad()
def encode(pipeline: QwenImageEditPipeline, edits: Sequence[Edit]) -> Encoded:
    parts = [
        _embed(pipeline, edits[start : start + PART]) for start in track(range(0, len(edits), PART), description="prompts")
    ]
    embeds, masks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Encoded(encode_pictures(pipeline.vae, pictures(edits)), embeds, masks)


def _embed(pipeline: QwenImageEditPipeline, edits: Sequence[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own embeddings, padded on the right; ValueError for prompts of more than `PROMPT_WIDTH` tokens."""
    images: Any = [Image.fromarray(picture) for picture in pictures(edits)]
    embeds, mask = pipeline.encode_prompt([edit.prompt for edit in edits], images, device=torch.device("cpu"))
    missing = PROMPT_WIDTH - embeds.shape[1]
    if missing < 0:
        raise ValueError(f"the longest of {len(edits)} prompts takes {embeds.shape[1]} tokens, more than {PROMPT_WIDTH}")
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask  # None is the pipeline's "all tokens are real"
    pad = torch.nn.functional.pad
    return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing)).bool()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Packed latents [len(images), GRID * GRID, 64], normalised as the transformer sees them."""
    mean, std = latent_scale(vae)
    side = GRID * PATCH_SIZE
    packed = []
    with single_frame_path(vae):
        for start in track(range(0, len(images), PART), description="latents"):
            latents = (encode_frame(vae, to_pixels(list(images[start : start + PART])))[0] - mean) / std
            packed.append(QwenImageEditPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, side, side))
    return torch.cat(packed)


def make_pairs(pipeline: QwenImageEditPipeline, count: int, seed: int) -> Pairs:
    edits = sample_edits(count, seed)
    return Pairs(encode(pipeline, edits), encode_pictures(pipeline.vae, [render.draw(edit.target) for edit in edits]))


def velocity(
    transformer: QwenImageTransformer2DModel, latents: torch.Tensor, sigma: torch.Tensor, told: Encoded, rows: torch.Tensor
) -> torch.Tensor:
    """[B, GRID * GRID, 64] of `latents` at `sigma` [B], told of these `rows` [B]."""
    prediction = transformer(
        hidden_states=torch.cat([latents, told.image_latents[rows]], dim=1),
        encoder_hidden_states=told.prompt_embeds[rows],
        encoder_hidden_states_mask=told.prompt_embeds_mask[rows],
        timestep=sigma,
        img_shapes=[[(1, GRID, GRID)] * 2] * len(rows),
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]].float()


def edit_loss(
    transformer: QwenImageTransformer2DModel, data: Pairs, settings: EditSettings, generator: torch.Generator
) -> torch.Tensor:
    """Of one random batch."""
    rows = torch.randint(len(data.latents), (settings.batch,), generator=generator)
    told = partial(velocity, transformer, told=data.told, rows=rows)
    return flow_matching(told, data.latents[rows], generator)
