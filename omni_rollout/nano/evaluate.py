"""Does the model draw what the prompt says? The stock pipeline samples, RapidOCR reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import QwenImagePipeline

from omni_rollout.nano import render
from omni_rollout.nano.ocr import exact_matches

SAMPLING_STEPS = 10
BATCH = 60


def cases(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """`count` pairs (text, color): all texts in turn, in a colour that moves on from round to round."""
    colors = list(render.COLORS)
    return [(texts[i % len(texts)], colors[(i + i // len(texts)) % len(colors)]) for i in range(count)]


def sample_images(pipeline: QwenImagePipeline, prompts: Sequence[str], *, true_cfg_scale: float, seed: int) -> list[np.ndarray]:
    """One uint8 image (64, 64, 3) per prompt, sampled without noise (ODE); a scale above 1 guides against the prompt " "."""
    generator = torch.Generator().manual_seed(seed)
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        negative: dict[str, Any] = {"negative_prompt": [" "] * len(batch)} if true_cfg_scale > 1 else {}
        output: Any = pipeline(
            prompt=batch,
            true_cfg_scale=true_cfg_scale,
            height=render.IMAGE_SIZE,
            width=render.IMAGE_SIZE,
            num_inference_steps=SAMPLING_STEPS,
            generator=generator,
            output_type="np",
            **negative,
        )
        images += list((output.images * 255).round().astype(np.uint8))
    return images


def accuracy(
    pipeline: QwenImagePipeline, asked: Sequence[tuple[str, str]], *, true_cfg_scale: float = 1.0, seed: int
) -> dict[str, Any]:
    """Shares of images whose text is read exactly (overall and by colour asked for) and whose colour is the one asked for."""
    prompts = [render.prompt_for(text, color) for text, color in asked]
    images = sample_images(pipeline, prompts, true_cfg_scale=true_cfg_scale, seed=seed)
    right = np.array(exact_matches(images, [text for text, _ in asked]))
    colors = np.array([color for _, color in asked])
    found = np.array([render.nearest_color(render.glyph_color(image)) for image in images])
    return {
        "images": len(asked),
        "true_cfg_scale": true_cfg_scale,
        "exact_match": round(float(right.mean()), 4),
        "right_color": round(float((found == colors).mean()), 4),
        "exact_match_by_color": {
            name: round(float(right[colors == name].mean()), 4) for name in render.COLORS if name in colors
        },
    }
