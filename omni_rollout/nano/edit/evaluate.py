"""Is the number still there, and in the colour asked for? Sampled without noise (ODE) on the rollout's own schedule."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel

from omni_rollout.models.qwen_image_edit import spec as family
from omni_rollout.nano import render
from omni_rollout.nano.edit.pairs import Edit, cases
from omni_rollout.nano.edit.training import PROMPT_WIDTH, encode, velocity
from omni_rollout.nano.evaluate import SAMPLING_STEPS
from omni_rollout.nano.ocr import exact_matches
from omni_rollout.nano.vae import latent_scale, to_images
from omni_rollout.types import InputImage

BATCH = 60
RECOLOURED = "recoloured"


@torch.no_grad()
def sample_images(
    pipeline: QwenImageEditPipeline, transformer: QwenImageTransformer2DModel, edits: Sequence[Edit], seed: int
) -> list[np.ndarray]:
    """One uint8 image (64, 64, 3) per edit."""
    told, side = encode(pipeline, edits), render.IMAGE_SIZE
    generator = torch.Generator().manual_seed(seed)
    picture = InputImage(path="", sha256="", height=side, width=side)  # only its size is asked for
    asked = {
        "num_inference_steps": SAMPLING_STEPS,
        "true_cfg_scale": 1.0,
        "prompt_width": PROMPT_WIDTH,
        "extra": {"vae_area": side * side, "vision_area": side * side},
    }
    sigmas = family.schedule(family.resolve(asked, [picture]), pipeline.scheduler.config).sigmas
    images: list[np.ndarray] = []
    for rows in torch.arange(len(edits)).split(BATCH):
        latents = torch.randn(told.image_latents[rows].shape, generator=generator)
        for sigma, sigma_next in pairwise(sigmas):
            latents += (sigma_next - sigma) * velocity(transformer, latents, sigma.expand(len(rows)), told, rows)
        images += _decode(pipeline, latents)
    return images


def _decode(pipeline: QwenImageEditPipeline, latents: torch.Tensor) -> list[np.ndarray]:
    vae = pipeline.vae
    frames = pipeline._unpack_latents(latents, render.IMAGE_SIZE, render.IMAGE_SIZE, pipeline.vae_scale_factor)
    mean, std = latent_scale(vae)
    return to_images(vae.decode(frames * std + mean, return_dict=False)[0])


def accuracy(
    pipeline: QwenImageEditPipeline,
    transformer: QwenImageTransformer2DModel,
    images: int,
    seed: int,
    texts: Sequence[str] = render.HELD_OUT,
) -> dict[str, Any]:
    """Shares of images whose number is read as the source's, whose colour is the one asked for, and of which both hold.

    Measured by the renderer's own idea of colour, not by the reward of the recipe.
    """
    edits = cases(texts, images)
    made = sample_images(pipeline, transformer, edits, seed)
    read = np.array(exact_matches(made, [edit.source.text for edit in edits]))
    colors = np.array([edit.color for edit in edits])
    right = np.array([render.nearest_color(render.glyph_color(image)) for image in made]) == colors
    return {
        "images": images,
        "exact_match": round(float(read.mean()), 4),
        "right_color": round(float(right.mean()), 4),
        RECOLOURED: round(float((read & right).mean()), 4),
        "recoloured_by_color": {
            name: round(float((read & right)[colors == name].mean()), 4) for name in render.COLORS if name in colors
        },
    }
