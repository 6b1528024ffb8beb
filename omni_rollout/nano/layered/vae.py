"""nano's VAE, grown to pictures with alpha and trained on to draw them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from rich.progress import track

from omni_rollout.nano import render
from omni_rollout.nano.layered import pictures
from omni_rollout.nano.vae import (
    Losses,
    VaeTraining,
    encode_frame,
    fit,
    keep_statistics,
    losses,
    reconstruct,
    single_frame_path,
    to_images,
    to_pixels,
)

CHANNELS = 4
PART = 64
"""Pictures that are encoded at a time."""


@dataclass(frozen=True)
class LayeredVaeSettings(VaeTraining):
    steps: int = 700
    signs: int = 4
    """Of a batch; each gives three pictures: the whole, the background, the number."""
    statistics_signs: int = 192
    evaluation_signs: int = 60


def grown(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """The same function of red, green and blue, with a fourth channel that it does not look at and draws opaque."""
    config: dict[str, Any] = {**vae.config, "input_channels": CHANNELS}
    wider: Any = AutoencoderKLQwenImage.from_config(config)
    weights = vae.state_dict()
    into, out, bias = "encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias"
    weights[into] = torch.cat([weights[into], torch.zeros_like(weights[into][:, :1])], dim=1)
    weights[out] = torch.cat([weights[out], torch.zeros_like(weights[out][:1])])
    weights[bias] = torch.cat([weights[bias], torch.ones(1)])
    wider.load_state_dict(weights)
    return wider.eval().requires_grad_(False)


def frames(signs: list[render.Sign]) -> torch.Tensor:
    """float32 [3 * signs, 4, 1, 64, 64] in [-1, 1]: of each sign the whole, the background, the number."""
    return to_pixels([picture for sign in signs for picture in (pictures.composite(sign), *pictures.layers(sign))])


def train_vae(vae: AutoencoderKLQwenImage, settings: LayeredVaeSettings, seed: int) -> None:
    """Train in place, and measure its latents anew."""
    torch.manual_seed(seed)
    signs = pictures.sample_signs(settings.steps * settings.signs, seed)

    def loss_of(step: int) -> Losses:
        return losses(vae, frames(signs[step * settings.signs : (step + 1) * settings.signs]))

    with single_frame_path(vae):
        fit(vae, loss_of, settings.steps, settings)
    keep_statistics(vae, encode(vae, pictures.sample_signs(settings.statistics_signs, seed + 1)))


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, signs: list[render.Sign]) -> torch.Tensor:
    """Posterior means [3 * signs, 16, 1, 8, 8] of `frames`, in the VAE's own scale."""
    starts = track(range(0, len(signs), PART), description="latents")
    with single_frame_path(vae):
        return torch.cat([encode_frame(vae, frames(signs[start : start + PART]))[0] for start in starts])


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKLQwenImage, count: int) -> dict[str, float]:
    """Numbers never trained on through the library's own encode and decode: what survives of colours and of alpha."""
    signs = pictures.cases(render.HELD_OUT, count)
    pixels = frames(signs)
    restored = reconstruct(vae, pixels)
    made = to_images(restored[len(pixels) // count - 1 :: len(pixels) // count])
    return {
        "signs": count,
        "mean_squared_error": float((restored - pixels).square().mean()),
        "alpha_iou": float(
            np.mean([iou(image[..., 3], pictures.matte(sign)) for image, sign in zip(made, signs, strict=True)])
        ),
    }


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Of two mattes [H, W] uint8: pixels covered by more than half in both, over those in either."""
    first, second = first > 127, second > 127
    return float((first & second).sum() / max(1, (first | second).sum()))
