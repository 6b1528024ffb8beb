"""How people rank an image for its prompt: ImageReward (arXiv 2304.05977), a BLIP whose text encoder looks at the image.

The first token's last hidden state goes through a head of linear layers; of their published training data the score has mean 0
and deviation 1.

The folder holds what is published as THUDM/ImageReward, `ImageReward.pt` and `med_config.json`, and beside them `vocab.txt` of
bert-base-uncased. The first is read as tensors alone. BLIP is transformers', into whose names the published ones are changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from omni_rollout.diffusion.machine import compute_device
from omni_rollout.errors import UserError
from omni_rollout.rewards.base.clip import BATCH
from omni_rollout.rewards.base.contract import Columns, Reward, check_media
from omni_rollout.rewards.base.sizes import IMAGE_REWARD_FILE as FILE
from omni_rollout.types import Kind

TEXT_CONFIG = "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, as published
TOKENS = 35  # of a prompt at most
HEAD_WIDTH = 64  # of an attention head of the vision tower, of every size that BLIP has
EPS = 1e-6  # of the vision tower's norms; transformers takes another, unless told
VISION_NAMES = (  # published -> transformers'
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.", "encoder.layers."),
)

Weights = Mapping[str, torch.Tensor]


class ImageReward:
    name = "image_reward"
    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, model: str) -> None:
        folder = Path(model)
        try:
            saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
            self._vision = _vision(_below(saved, "blip.visual_encoder.")).to(compute_device())
            config = json.loads((folder / TEXT_CONFIG).read_text(encoding="utf-8"))
            width = self._vision.config.hidden_size
            self._text = _text(_below(saved, "blip.text_encoder."), config, width).to(compute_device())
            head = _below(saved, "mlp.layers.")  # 0.weight, 0.bias, 2.weight, ...: dropout between them while it was trained
            layers = sorted({int(name.split(".")[0]) for name in head})
            self._head = [[head[f"{layer}.{part}"].to(compute_device()) for part in ("weight", "bias")] for layer in layers]
            if not (folder / "vocab.txt").is_file():
                raise ValueError("no vocab.txt of bert-base-uncased")
            self._tokenizer = BertTokenizer.from_pretrained(model)
        except Exception as error:  # torch has many
            problem = str(error).splitlines()[0]
            raise UserError(
                f"reward image_reward: {model} cannot be read ({problem}); expected {FILE} and {TEXT_CONFIG} as published, "
                "and vocab.txt of bert-base-uncased"
            ) from error
        side: Any = self._vision.config.image_size
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        check_media(self.name, images, prompts)
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            scores += self._scores(list(images[batch]), list(prompts[batch]))
        return scores

    def _scores(self, images: list[np.ndarray], prompts: list[str]) -> list[float]:
        device = self._vision.device
        pixels: Any = self._processor(images, return_tensors="pt", input_data_format="channels_last")
        words: Any = self._tokenizer(prompts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt").to(device)
        seen = self._vision(pixel_values=pixels["pixel_values"].to(device)).last_hidden_state
        out = self._text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        )
        values = out.last_hidden_state[:, 0].float()
        for weight, bias in self._head:
            values = torch.nn.functional.linear(values, weight, bias)
        return ((values[:, 0] - MEAN) / STD).tolist()


def make(threads: int, model: str | None = None) -> Reward:
    if model is None:
        raise UserError(f"reward image_reward: give reward.model.image_reward=FOLDER, with {FILE}, {TEXT_CONFIG} and vocab.txt")
    return ImageReward(model)


def _below(saved: Weights, prefix: str) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(prefix): value.float() for name, value in saved.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no weights whose names begin with {prefix}")
    return found


def _vision(saved: Weights) -> Any:
    """The vision tower; its sizes are its weights'."""
    kernel, places = saved["patch_embed.proj.weight"], saved["pos_embed"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=saved["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in saved if name.startswith("blocks.")}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * isqrt(places.shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=EPS,
    )
    network = BlipVisionModel(config)
    network.load_state_dict({_renamed(name): value for name, value in saved.items()})
    return network.eval()


def _text(saved: Weights, config: Mapping[str, Any], vision_width: int) -> Any:
    """The text encoder, of the sizes in med_config.json."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id")
    given = {key: config[key] for key in (*keys, *more)}
    network = BlipTextModel(BlipTextConfig(**given, encoder_hidden_size=vision_width), add_pooling_layer=False)
    network.load_state_dict({name: value for name, value in saved.items() if not name.endswith("position_ids")})
    return network.eval()


def _renamed(name: str) -> str:
    for published, ours in VISION_NAMES:
        name, times = re.subn(published, ours, name)
        if times:
            break
    return name
