"""nano's VAE, of whose architecture Wan's is, trained on to see and draw motion."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from rich.progress import track

from omni_rollout.nano.ocr import exact_matches
from omni_rollout.nano.vae import Losses, VaeTraining, fit, keep_statistics
from omni_rollout.nano.wan import scenes
from omni_rollout.nano.wan.scenes import Scene

PART = 16
"""Videos that are encoded or decoded at a time."""
SHARED = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
CROP = 32
"""Pixels of a crop's side."""


@dataclass(frozen=True)
class WanVaeSettings(VaeTraining):
    steps: int = 400
    batch: int = 4
    statistics_scenes: int = 128
    evaluation_scenes: int = 60


def grown(vae: AutoencoderKLQwenImage) -> AutoencoderKLWan:
    """Wan's class with nano's weights, which were trained on single pictures.

    What mixes frames was not: it begins as taking the last of two and as drawing each twice, so that stills come out as before.
    """
    config: Any = vae.config
    video = AutoencoderKLWan(**{name: config[name] for name in SHARED})
    video.load_state_dict(vae.state_dict())
    with torch.no_grad():
        for name, weight in video.named_parameters():
            if name.endswith("time_conv.weight"):
                same = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
                weight.zero_()[:, :, -1, 0, 0] = same
            elif name.endswith("time_conv.bias"):
                weight.zero_()
    return video.eval().requires_grad_(False)


def to_pixels(made: list[Scene]) -> torch.Tensor:
    """float32 [B, 3, FRAMES, HEIGHT, WIDTH] in [-1, 1], the VAE's input."""
    return torch.from_numpy(np.stack([scenes.film(scene) for scene in made])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_videos(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [B, FRAMES, HEIGHT, WIDTH, 3]: inverse of `to_pixels`, clamped."""
    return ((pixels.permute(0, 2, 3, 4, 1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def train_vae(vae: AutoencoderKLWan, settings: WanVaeSettings, seed: int) -> None:
    """Train in place on crops, and measure its latents."""
    torch.manual_seed(seed)
    rng, made = random.Random(f"video VAE {seed}"), scenes.sample_scenes(settings.steps * settings.batch, seed)

    def loss_of(step: int) -> Losses:
        videos = _cropped(rng, to_pixels(made[step * settings.batch : (step + 1) * settings.batch]))
        posterior = vae.encode(videos, return_dict=False)[0]
        difference = vae.decode(posterior.sample(), return_dict=False)[0] - videos
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return difference.square().mean(), F.avg_pool3d(difference, (1, 8, 8)).square().mean(), kl

    fit(vae, loss_of, settings.steps, settings)
    keep_statistics(vae, encode(vae, scenes.sample_scenes(settings.statistics_scenes, seed + 1)))


def _cropped(rng: random.Random, videos: torch.Tensor) -> torch.Tensor:
    top, left = rng.randint(0, scenes.HEIGHT - CROP), rng.randint(0, scenes.WIDTH - CROP)
    return videos[..., top : top + CROP, left : left + CROP]


@torch.no_grad()
def encode(vae: AutoencoderKLWan, made: list[Scene]) -> torch.Tensor:
    """Posterior means [scenes, 16, 2, 6, 8], in the VAE's own scale."""
    starts = track(range(0, len(made), PART), description="latents")
    parts = [vae.encode(to_pixels(made[start : start + PART]), return_dict=False)[0].mode() for start in starts]
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> np.ndarray:
    """uint8 [B, FRAMES, HEIGHT, WIDTH, 3] of latents in the VAE's own scale."""
    return np.concatenate([to_videos(vae.decode(part, return_dict=False)[0]) for part in latents.split(PART)])


def evaluate_vae(vae: AutoencoderKLWan, count: int) -> dict[str, float]:
    """Scenes never trained on, encoded and decoded: what survives of them, and how many last frames are read."""
    made = scenes.cases(scenes.HELD_OUT, count)
    restored, originals = decode(vae, encode(vae, made)), np.stack([scenes.film(scene) for scene in made])
    digits = [scene.digit for scene in made]
    return {
        "scenes": count,
        "mean_absolute_error_0_255": float(np.abs(restored.astype(float) - originals).mean()),
        "ocr_accuracy": float(np.mean(exact_matches(restored[:, -1], digits))),
        "ocr_accuracy_of_originals": float(np.mean(exact_matches(originals[:, -1], digits))),
    }
