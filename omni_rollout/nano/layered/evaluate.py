"""Does the number's layer hold the number, and nothing else? Sampled without noise (ODE) on the rollout's own schedule."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from omni_rollout.models.qwen_image_layered import spec as family
from omni_rollout.nano import render
from omni_rollout.nano.evaluate import SAMPLING_STEPS
from omni_rollout.nano.layered.pictures import LAYERS, cases, matte
from omni_rollout.nano.layered.training import TOKENS, encode_signs, velocity
from omni_rollout.nano.layered.vae import iou
from omni_rollout.nano.ocr import exact_matches
from omni_rollout.nano.tokenizer import PROMPT_WIDTH
from omni_rollout.nano.vae import latent_scale, to_images
from omni_rollout.types import InputImage

BATCH = 60
LAYERED = "layered"
LEAST_IOU = 0.6
"""Of the number's layer with the number, from which on it counts as taken off."""


@torch.no_grad()
def sample_layers(
    pipeline: QwenImagePipeline,
    vae: AutoencoderKLQwenImage,
    transformer: QwenImageTransformer2DModel,
    signs: Sequence[render.Sign],
    seed: int,
) -> np.ndarray:
    """uint8 [signs, LAYERS, 64, 64, 4]."""
    told, side = encode_signs(pipeline, vae, signs), render.IMAGE_SIZE
    picture = InputImage(path="", sha256="", height=side, width=side)  # only its size is asked for
    asked = {
        "num_inference_steps": SAMPLING_STEPS,
        "true_cfg_scale": 1.0,
        "prompt_width": PROMPT_WIDTH,
        "extra": {"layers": LAYERS, "resolution": side},
    }
    sigmas = family.schedule(family.resolve(asked, [picture]), pipeline.scheduler.config).sigmas
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in torch.arange(len(signs)).split(BATCH):
        latents = torch.randn(told.latents[rows].shape, generator=generator)
        for sigma, sigma_next in pairwise(sigmas):
            latents += (sigma_next - sigma) * velocity(transformer, latents, sigma.expand(len(rows)), told, rows)
        made += _decode(vae, latents[:, TOKENS:])
    return np.stack(made).reshape(len(signs), LAYERS, side, side, 4)


def _decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> list[np.ndarray]:
    frames = latents.reshape(-1, TOKENS, latents.shape[-1])
    side = render.IMAGE_SIZE
    unpacked = QwenImagePipeline._unpack_latents(frames, side, side, 2 ** len(vae.temperal_downsample))
    mean, std = latent_scale(vae)
    return to_images(vae.decode(unpacked * std + mean, return_dict=False)[0])


def accuracy(
    pipeline: QwenImagePipeline,
    vae: AutoencoderKLQwenImage,
    transformer: QwenImageTransformer2DModel,
    images: int,
    seed: int,
    texts: Sequence[str] = render.HELD_OUT,
) -> dict[str, Any]:
    """Shares of the numbers' layers that, laid over white, are read as the number, whose alpha is the number's, and of both."""
    signs = cases(texts, images)
    made = sample_layers(pipeline, vae, transformer, signs, seed)
    tops = made[:, -1].astype(float)
    alpha = tops[..., 3:] / 255
    over_white = (tops[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    read = np.array(exact_matches(over_white, [sign.text for sign in signs]))
    agreement = np.array([iou(top[..., 3], matte(sign)) for top, sign in zip(made[:, -1], signs, strict=True)])
    grounds = np.array([sign.background for sign in signs])[:, None, None]
    return {
        "images": images,
        "exact_match": round(float(read.mean()), 4),
        "iou": round(float(agreement.mean()), 4),
        LAYERED: round(float((read & (agreement >= LEAST_IOU)).mean()), 4),
        "background_error_0_255": round(float(np.abs(made[:, 0, ..., :3].astype(float) - grounds).mean()), 2),
    }
