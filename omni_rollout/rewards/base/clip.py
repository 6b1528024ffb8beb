"""Rewards that are read off a CLIP model (`transformers.CLIPModel`): loaded once, batched, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain, islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from omni_rollout.diffusion.machine import compute_device
from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, check_media
from omni_rollout.rewards.base.pretrained import whole
from omni_rollout.types import Kind

BATCH = 16


@cache  # a run makes its rewards twice: to check them before the engine starts, and to use them
def _loaded(model: str) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    network = whole(CLIPModel, model).eval().to(compute_device())
    return network, CLIPTokenizer.from_pretrained(model), CLIPImageProcessorPil.from_pretrained(model)


class Clip:
    """Image and text embeddings of unit length.

    Args:
        model: a folder, or a hub id, with weights, tokenizer and image processor.

    Raises:
        UserError: nothing of that kind can be loaded from there.
    """

    def __init__(self, name: str, model: str) -> None:
        try:
            self.model, self._tokenizer, self._processor = _loaded(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward {name}: no CLIP model in {model} ({str(error).splitlines()[0]}); give reward.model.{name}=FOLDER"
            ) from error

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [H, W, 3] each -> [B, D] fp32."""
        pixels: Any = self._processor(list(images), return_tensors="pt", input_data_format="channels_last")
        vision = self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.model.device))
        return torch.nn.functional.normalize(self.model.visual_projection(vision.pooler_output).float(), dim=-1)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """[B, D] fp32; a text is cut at the model's length."""
        tokens: Any = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        text = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return torch.nn.functional.normalize(self.model.text_projection(text.pooler_output).float(), dim=-1)


class CosineReward:
    """A number times the cosine of an image and its prompt; of a video the mean over its frames.

    Args:
        scale: None: the model's own, exp(logit_scale).
        least: what a lower score is raised to.
    """

    kinds: frozenset[Kind] = frozenset({"image", "video"})

    def __init__(self, name: str, model: str, *, scale: float | None, least: float | None = None) -> None:
        self.name, self._clip, self._least = name, Clip(name, model), least
        self._scale = float(self._clip.model.logit_scale.detach().exp()) if scale is None else scale

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        kind: Kind = "video" if len(images) and images[0].ndim == 4 else "image"
        check_media(self.name, images, prompts, kind)
        frames = [list(media) if kind == "video" else [media] for media in images]
        texts = [text for text, own in zip(prompts, frames, strict=True) for _ in own]
        scores = iter(self._of_frames(list(chain.from_iterable(frames)), texts))
        return [fmean(islice(scores, len(own))) for own in frames]

    def _of_frames(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(frames), BATCH):
            batch = slice(start, start + BATCH)
            cosines = (self._clip.images(frames[batch]) * self._clip.texts(texts[batch])).sum(dim=-1)
            scores += (self._scale * cosines).tolist()
        return scores if self._least is None else [max(score, self._least) for score in scores]
