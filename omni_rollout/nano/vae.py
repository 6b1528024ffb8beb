"""Training the nano VAE on rendered signs."""

import logging
import math
import random
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from rich.progress import track

from omni_rollout.models.qwen_image.decoder import FrameConv
from omni_rollout.nano import render
from omni_rollout.nano.components import make_vae
from omni_rollout.nano.ocr import read_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeTraining:
    """What any training of a nano VAE is told."""

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    kl_weight: float = 5e-4
    color_weight: float = 2.0
    """Weight of the error of 8x8 pixel means: without it the VAE keeps shapes and forgets colours."""


@dataclass(frozen=True)
class VaeSettings(VaeTraining):
    base_dim: int = 8
    dim_mult: tuple[int, ...] = (1, 3, 6, 6)
    crop_steps: int = 3000
    """Steps on half-size crops, where most is learned at a quarter of the cost; full images follow."""
    full_steps: int = 1500
    crop_batch: int = 16
    full_batch: int = 8
    learning_rate: float = 2e-3
    statistics_images: int = 512
    evaluation_images: int = 120


@contextmanager
def single_frame_path(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Inside this context `encode_frame` and `decode_frame` on this VAE take half the time, with gradients.

    Convolutions are those of the engine's decoder (`models/qwen_image/decoder.py`). Only this object's modules change, and
    leaving the context restores them.
    """
    convolutions = [module for module in vae.modules() if type(module) is QwenImageCausalConv3d]
    norms = [module for module in vae.modules() if isinstance(module, QwenImageRMS_norm)]
    for convolution in convolutions:
        convolution.__class__ = FrameConv
    for norm in norms:
        norm.__dict__["forward"] = _rms_norm(norm)
    try:
        yield
    finally:
        for convolution in convolutions:
            convolution.__class__ = QwenImageCausalConv3d
        for norm in norms:
            del norm.__dict__["forward"]


def _rms_norm(norm: QwenImageRMS_norm) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * norm.gamma + norm.bias

    return forward


def encode_frame(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior (mean, log variance), each [B, 16, 1, H/8, W/8], of images [B, 3, 1, H, W] in [-1, 1].

    Raises ValueError for more than one frame.
    """
    if images.shape[2] != 1:
        raise ValueError(f"expected one frame, got images of shape {tuple(images.shape)}")
    mean, log_variance = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_frame(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, 1, H, W], not clamped, of latents [B, 16, 1, H/8, W/8] in the VAE's own scale."""
    return vae.decoder(vae.post_quant_conv(latents))


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 images (H, W, 3) -> float32 [B, 3, 1, H, W] in [-1, 1], the VAE's input."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[np.ndarray]:
    """Inverse of `to_pixels`, clamped."""
    return list(((pixels[:, :, 0].permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


@torch.no_grad()
def reconstruct(vae: AutoencoderKLQwenImage, pixels: torch.Tensor) -> torch.Tensor:
    """Encode (posterior mean) and decode [B, 3, 1, 64, 64] through the library's own path, as sampling does."""
    parts = []
    for part in pixels.split(24):
        latents = vae.encode(part, return_dict=False)[0].mode()
        parts.append(vae.decode(latents, return_dict=False)[0])
    return torch.cat(parts)


def _any_sign(rng: random.Random) -> render.Sign:
    """A training sign; now and then any three letters, so that the VAE can also show what the list of words lacks."""
    text = "".join(rng.choices(string.ascii_lowercase, k=3)) if rng.random() < 0.15 else render.sample_text(rng)
    return render.sample_sign(rng, text, rng.choice(list(render.COLORS)))


def _batch(rng: random.Random, size: int) -> torch.Tensor:
    return to_pixels([render.draw(_any_sign(rng)) for _ in range(size)])


def _crops(rng: random.Random, size: int) -> torch.Tensor:
    half = render.IMAGE_SIZE // 2
    corners = [(rng.randint(4, half - 4), rng.randint(0, half)) for _ in range(size)]
    images = _batch(rng, size)
    return torch.stack([x[..., top : top + half, left : left + half] for x, (top, left) in zip(images, corners, strict=True)])


def train_vae(settings: VaeSettings, seed: int) -> AutoencoderKLQwenImage:
    """A trained VAE in eval mode, its config carrying the measured latents_mean and latents_std."""
    torch.manual_seed(seed)
    rng = random.Random(f"vae {seed}")
    vae = make_vae(base_dim=settings.base_dim, dim_mult=settings.dim_mult)
    steps = settings.crop_steps + settings.full_steps

    def loss_of(step: int) -> Losses:
        crop = step < settings.crop_steps
        return losses(vae, _crops(rng, settings.crop_batch) if crop else _batch(rng, settings.full_batch))

    with single_frame_path(vae):
        fit(vae, loss_of, steps, settings)
        keep_statistics(
            vae, torch.cat([encode_frame(vae, _batch(rng, 32))[0] for _ in range(settings.statistics_images // 32)])
        )
    return vae


Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Squared error of pixels, of means of 8x8 pixels, and the posterior's KL."""


def fit(vae: Any, loss_of: Callable[[int], Losses], steps: int, settings: VaeTraining) -> None:
    """Train in place, and leave it in eval mode. `loss_of` is asked once for each step, in their order."""
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    for step in track(range(steps), description="VAE"):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) * 0.98 + 0.02
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * cosine
        error, color_error, kl = parts = loss_of(step)
        optimizer.zero_grad()
        (error + settings.color_weight * color_error + settings.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            logger.info("VAE step %d of %d: error %.4f, colour %.4f, KL %.2f", step + 1, steps, *(x.item() for x in parts))
    vae.eval().requires_grad_(False)


def keep_statistics(vae: Any, latents: torch.Tensor) -> None:
    """In its config: mean and standard deviation of each channel of latents [B, 16, T, H, W]."""
    vae.register_to_config(latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist())


def latent_scale(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) of its latents, each [1, 16, 1, 1, 1]: the transformer sees (latents - mean) / deviation."""
    mean, deviation = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return mean, deviation


def losses(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> Losses:
    """Of one batch [B, channels, 1, H, W] in [-1, 1]."""
    mean, log_variance = encode_frame(vae, images)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    difference = (decode_frame(vae, latents) - images)[:, :, 0]
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return difference.square().mean(), F.avg_pool2d(difference, 8).square().mean(), kl


def evaluate_vae(vae: AutoencoderKLQwenImage, count: int) -> dict[str, float]:
    """Reconstruct signs of held-out numbers through the library's own encode and decode; see what survives."""
    rng = random.Random("vae evaluation")
    colors = list(render.COLORS)
    signs = [render.sample_sign(rng, render.HELD_OUT[i % len(render.HELD_OUT)], colors[i % len(colors)]) for i in range(count)]
    originals = [render.draw(sign) for sign in signs]
    pixels = to_pixels(originals)
    restored = reconstruct(vae, pixels)
    images = to_images(restored)
    found = [render.glyph_color(image) for image in images]
    shift = [np.abs(render.glyph_color(image) - color).mean() for image, color in zip(originals, found, strict=True)]
    right_color = [render.nearest_color(color) == sign.color for color, sign in zip(found, signs, strict=True)]
    return {
        "images": count,
        "mean_squared_error": float((restored - pixels).square().mean()),
        "glyph_color_error_0_255": float(np.mean(shift)),
        "glyph_color_accuracy": float(np.mean(right_color)),
        "ocr_accuracy": float(np.mean([read_text(x) == sign.text for x, sign in zip(images, signs, strict=True)])),
        "ocr_accuracy_of_originals": float(
            np.mean([read_text(x) == sign.text for x, sign in zip(originals, signs, strict=True)])
        ),
    }
