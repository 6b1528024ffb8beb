"""Does the digit asked for move where it should? Sampled without noise (ODE) on the rollout's own schedule."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from omni_rollout.models.wan2_2 import spec as family
from omni_rollout.nano import render
from omni_rollout.nano.evaluate import SAMPLING_STEPS
from omni_rollout.nano.ocr import exact_matches
from omni_rollout.nano.vae import latent_scale
from omni_rollout.nano.wan.scenes import DIRECTIONS, FRAMES, HEIGHT, HELD_OUT, WIDTH, Scene, Task, cases
from omni_rollout.nano.wan.training import PROMPT_WIDTH, Experts, encode_scenes, velocity
from omni_rollout.nano.wan.vae import decode

BATCH = 60
FLOW_SHIFT = 3.0
MOVED = "moved_and_read"
LEAST_MOVE = 6.0
"""Pixels from the first frame to the last. The slowest scene moves 12."""


@torch.no_grad()
def sample_videos(pipeline: WanPipeline, experts: Experts, made: Sequence[Scene], seed: int) -> np.ndarray:
    """uint8 [scenes, FRAMES, HEIGHT, WIDTH, 3]."""
    told = encode_scenes(pipeline, made)
    asked = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": SAMPLING_STEPS,
        "true_cfg_scale": 1.0,
        "prompt_width": PROMPT_WIDTH,
        "extra": {"frames": FRAMES, "flow_shift": FLOW_SHIFT},
    }
    spec = family.resolve(asked)
    sigmas = family.schedule(spec, pipeline.scheduler.config).sigmas
    generator = torch.Generator().manual_seed(seed)
    mean, std = latent_scale(pipeline.vae)
    videos = []
    for rows in torch.arange(len(made)).split(BATCH):
        latents = torch.randn(told.latents[rows].shape, generator=generator)
        for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            network: Any = experts[family.EXPERTS[family.expert(spec, step)]]
            answer = velocity(network, latents, sigma.expand(len(rows)), told.prompt_embeds[rows])
            latents += (sigma_next - sigma) * answer
        videos.append(decode(pipeline.vae, latents * std + mean))
    return np.concatenate(videos)


def accuracy(
    pipeline: WanPipeline, experts: Experts, images: int, seed: int, tasks: Sequence[Task] = HELD_OUT
) -> dict[str, Any]:
    """Shares of videos whose digit is read in the last frame, moves where it should, has its colour; and of the first two.

    Measured by the renderer's own idea of what is a digit's, not by the reward of the recipe.
    """
    made = cases(tasks, images)
    videos = sample_videos(pipeline, experts, made, seed)
    read = np.array(exact_matches(videos[:, -1], [scene.digit for scene in made]))
    way = np.array([_center(video[-1]) - _center(video[0]) for video in videos])
    moved = way * np.array([DIRECTIONS[scene.direction] for scene in made]) >= LEAST_MOVE
    colors = [render.nearest_color(render.glyph_color(video[-1])) for video in videos]
    return {
        "images": images,
        "exact_match": round(float(read.mean()), 4),
        "moved": round(float(moved.mean()), 4),
        "right_color": round(float(np.mean([color == scene.color for color, scene in zip(colors, made, strict=True)])), 4),
        MOVED: round(float((read & moved).mean()), 4),
    }


def _center(frame: np.ndarray) -> float:
    """Mean column of what differs from the border's median colour, each pixel by how much."""
    pixels = frame.astype(float)
    border = np.median(np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)]), axis=0)
    distance = np.linalg.norm(pixels - border, axis=-1)
    weight = np.where(distance > 0.5 * distance.max(), distance, 0.0).sum(axis=0)
    return float((weight * np.arange(len(weight))).sum() / max(weight.sum(), 1e-9))
