"""How large the models of rewards are that run in the process which scores, by their config.json: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from omni_rollout.config import TrainConfig
from omni_rollout.models.base.sizes import read_config, stored_bytes, stored_item
from omni_rollout.rewards.clip_score import MODEL as CLIP_L
from omni_rollout.rewards.geneval import MODEL as GENEVAL
from omni_rollout.rewards.pickscore import MODEL as PICKSCORE

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
IMAGE_REWARD, IMAGE_REWARD_FILE = "THUDM/ImageReward", "ImageReward.pt"
HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)  # of aesthetic.py, a matrix and a bias from each to the next
MODELS = {  # hpsv2's is tuned: as large
    **{"clip_score": CLIP_L, "pickscore": PICKSCORE, "hpsv2": CLIP_H, "aesthetic": CLIP_L},
    **{"geneval": GENEVAL, "geneval_strict": GENEVAL, "image_reward": IMAGE_REWARD},
}
PARAMETERS = {GENEVAL.partition("+")[0]: 68_741_083, IMAGE_REWARD: 446_206_689}  # of published models that are no CLIP
DEFAULTS = {  # of `transformers.CLIPConfig`, for what a config.json leaves out
    "text_config": {
        **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
        **{"vocab_size": 49408, "max_position_embeddings": 77},
    },
    "vision_config": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_channels": 3, "image_size": 224, "patch_size": 32},
    },
}
_H = {
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14},
    "projection_dim": 1024,
}
# What the published config.json files say, on the hub under these names, where they enter the formulas. Weights in float32.
PUBLISHED: dict[str, dict[str, Any]] = {
    CLIP_L: {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14},
        "projection_dim": 768,
    },
    PICKSCORE: _H,
    CLIP_H: _H,
}


def model_bytes(config: TrainConfig) -> dict[str, int | None]:
    """Reward -> bytes of the weights it loads, of those that load any; 0 where another's are used; None: size not known.

    Raises:
        UserError: a folder's config.json cannot be read.
    """
    names = [name for name in MODELS if name in {**config.reward.weights, **config.evaluation.reward.weights}]
    found: dict[str, int | None] = {}
    loaded: set[str] = set()
    for name in names:
        if name in config.reward.source:
            continue
        models = _models(name, config.reward.model.get(name, MODELS[name]))
        sizes = [0 if model in loaded else _weights(model) for model in models]
        head = 4 * sum(wide * narrow + narrow for wide, narrow in pairwise(HEAD_WIDTHS)) if name == "aesthetic" else 0
        known = [size for size in sizes if size is not None]
        found[name] = sum(known) + head if len(known) == len(sizes) else None
        loaded |= set(models)
    return found


def _models(name: str, given: str) -> list[str]:
    """Folders or hub ids: of geneval two, written as one."""
    if MODELS[name] != GENEVAL:
        return [given]
    detector, _, clip = given.partition("+")
    return [detector, clip or CLIP_L]


def _weights(model: str) -> int | None:
    folder = Path(model)
    if (folder / IMAGE_REWARD_FILE).is_file():
        return (folder / IMAGE_REWARD_FILE).stat().st_size  # float32, and nothing else of any size
    if folder.is_dir():
        config = read_config(folder)
        if config.get("model_type") == "mask2former":
            return stored_bytes(folder)
        return stored_item(folder, 4) * clip_parameters(config)
    parameters = clip_parameters(PUBLISHED[model]) if model in PUBLISHED else PARAMETERS.get(model)
    return None if parameters is None else 4 * parameters


def clip_parameters(config: Mapping[str, Any]) -> int:
    """Of `transformers.CLIPModel`."""
    text, vision = ({**defaults, **config.get(part, {})} for part, defaults in DEFAULTS.items())
    projection = config.get("projection_dim", 512)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    width = vision["hidden_size"]
    words = text["hidden_size"] * (text["vocab_size"] + text["max_position_embeddings"] + 2)  # and the last norm
    pixels = width * (vision["num_channels"] * vision["patch_size"] ** 2 + patches + 2 + 4)  # class, its place, two norms
    return words + pixels + _blocks(text) + _blocks(vision) + projection * (text["hidden_size"] + width) + 1


def _blocks(tower: Mapping[str, Any]) -> int:
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    attention, mlp, norms = 4 * (width * width + width), 2 * width * inner + inner + width, 4 * width
    return tower["num_hidden_layers"] * (attention + mlp + norms)
