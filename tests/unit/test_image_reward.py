"""ImageReward with small random weights under the published names, against the model's formulas written out here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.rewards import get_reward
from omni_rollout.rewards.base import sizes
from omni_rollout.rewards.base.clip import BATCH

WIDTH, PATCH, SIDE, VISION_LAYERS = 128, 8, 32, 2  # two heads of 64
TEXT = {
    **{"vocab_size": 40, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "two", "dogs", "on", "table"]
TEXTS = ["a cat", "Two dogs on a RED table", "red " * 60]  # the last is longer than is read
IMAGES = list(np.random.default_rng(0).integers(0, 256, (BATCH + 2, SIDE, SIDE, 3), np.uint8))
PROMPTS = [TEXTS[number % 3] for number in range(len(IMAGES))]

Weights = Mapping[str, torch.Tensor]


def published() -> dict[str, torch.Tensor]:
    """Names and shapes of `ImageReward.pt`, small."""
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, WIDTH),
        "visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
        "text_encoder.embeddings.word_embeddings.weight": (TEXT["vocab_size"], hidden),
        "text_encoder.embeddings.position_embeddings.weight": (TEXT["max_position_embeddings"], hidden),
        "vision_proj.weight": (8, WIDTH),
        "text_proj.weight": (8, hidden),
    }
    products, norms = {}, {"visual_encoder.norm": WIDTH, "text_encoder.embeddings.LayerNorm": hidden}
    for layer in range(VISION_LAYERS):
        block = f"visual_encoder.blocks.{layer}."
        norms |= {f"{block}norm1": WIDTH, f"{block}norm2": WIDTH}
        products |= {f"{block}attn.qkv": (3 * WIDTH, WIDTH), f"{block}attn.proj": (WIDTH, WIDTH)}
        products |= {f"{block}mlp.fc1": (4 * WIDTH, WIDTH), f"{block}mlp.fc2": (WIDTH, 4 * WIDTH)}
    for layer in range(TEXT["num_hidden_layers"]):
        block = f"text_encoder.encoder.layer.{layer}."
        for kind, seen in (("attention", hidden), ("crossattention", WIDTH)):
            norms[f"{block}{kind}.output.LayerNorm"] = hidden
            products |= {f"{block}{kind}.self.query": (hidden, hidden), f"{block}{kind}.output.dense": (hidden, hidden)}
            products |= {f"{block}{kind}.self.key": (hidden, seen), f"{block}{kind}.self.value": (hidden, seen)}
        norms[f"{block}output.LayerNorm"] = hidden
        products |= {f"{block}intermediate.dense": (inner, hidden), f"{block}output.dense": (hidden, inner)}
    for name, shape in products.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    random = torch.Generator().manual_seed(0)
    saved = {name: torch.randn(shape, generator=random) * 0.15 for name, shape in shapes.items()}
    for name, width in norms.items():
        saved[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=random)
        saved[f"{name}.bias"] = 0.3 * torch.randn(width, generator=random)
    saved = {f"blip.{name}": value for name, value in saved.items()}
    saved["blip.text_encoder.embeddings.position_ids"] = torch.arange(TEXT["max_position_embeddings"])[None]
    for layer, (wide, narrow) in zip((0, 2, 4), ((hidden, 10), (10, 6), (6, 1)), strict=True):
        saved[f"mlp.layers.{layer}.weight"] = torch.randn(narrow, wide, generator=random)
        saved[f"mlp.layers.{layer}.bias"] = torch.randn(narrow, generator=random)
    return saved


def write(folder: Path, saved: Mapping[str, Any]) -> Path:
    torch.save(saved, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**TEXT, "architectures": ["BertModel"], "add_cross_attention": True}))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("image_reward"), published())


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, W], [M, W], [M, W] -> [N, W]."""
    size = query.shape[-1] // heads
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    return torch.cat([(query[:, p] @ key[:, p].T / math.sqrt(size)).softmax(-1) @ value[:, p] for p in parts], dim=-1)


class ByHand:
    def __init__(self, saved: Weights) -> None:
        self.saved = saved

    def product(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return linear(values, self.saved[f"{name}.weight"], self.saved[f"{name}.bias"])

    def norm(self, name: str, values: torch.Tensor, eps: float) -> torch.Tensor:
        return layer_norm(values, values.shape[-1:], self.saved[f"{name}.weight"], self.saved[f"{name}.bias"], eps)

    def vision(self, image: np.ndarray) -> torch.Tensor:
        """uint8 [SIDE, SIDE, 3] -> [N, WIDTH]."""
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        pixels = (torch.tensor(image) / 255 - mean) / std
        root, rows = "blip.visual_encoder.", range(0, SIDE, PATCH)
        patches = torch.stack([pixels[y : y + PATCH, x : x + PATCH].permute(2, 0, 1).flatten() for y in rows for x in rows])
        kernel = self.saved[f"{root}patch_embed.proj.weight"].flatten(1)
        values = torch.cat([self.saved[f"{root}cls_token"][0], patches @ kernel.T + self.saved[f"{root}patch_embed.proj.bias"]])
        values = values + self.saved[f"{root}pos_embed"][0]
        for layer in range(VISION_LAYERS):
            block = f"{root}blocks.{layer}."
            qkv = self.product(f"{block}attn.qkv", self.norm(f"{block}norm1", values, 1e-6))
            values = values + self.product(f"{block}attn.proj", attended(*qkv.split(WIDTH, dim=-1), heads=2))
            inner = gelu(self.product(f"{block}mlp.fc1", self.norm(f"{block}norm2", values, 1e-6)))
            values = values + self.product(f"{block}mlp.fc2", inner)
        return self.norm(f"{root}norm", values, 1e-6)

    def score(self, image: np.ndarray, prompt: str) -> float:
        seen = self.vision(image)
        words = [WORDS.index(word) for word in prompt.lower().split()][:33]
        ids = torch.tensor([WORDS.index("[CLS]"), *words, WORDS.index("[SEP]")])
        root = "blip.text_encoder."
        values = self.saved[f"{root}embeddings.word_embeddings.weight"][ids]
        values = values + self.saved[f"{root}embeddings.position_embeddings.weight"][: len(ids)]
        values = self.norm(f"{root}embeddings.LayerNorm", values, 1e-12)
        for layer in range(TEXT["num_hidden_layers"]):
            block = f"{root}encoder.layer.{layer}."
            for kind in ("attention", "crossattention"):
                other = values if kind == "attention" else seen
                query = self.product(f"{block}{kind}.self.query", values)
                key, value = (self.product(f"{block}{kind}.self.{part}", other) for part in ("key", "value"))
                out = self.product(f"{block}{kind}.output.dense", attended(query, key, value, heads=4))
                values = self.norm(f"{block}{kind}.output.LayerNorm", out + values, 1e-12)
            out = self.product(f"{block}output.dense", gelu(self.product(f"{block}intermediate.dense", values)))
            values = self.norm(f"{block}output.LayerNorm", out + values, 1e-12)
        score = values[0]
        for layer in (0, 2, 4):
            score = self.product(f"mlp.layers.{layer}", score)
        return (score.item() - 0.16717362830052426) / 1.0333394966054072


def test_the_scores_are_those_of_the_formulas(folder: Path) -> None:
    by_hand = ByHand(published())
    expected = [by_hand.score(image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    found = get_reward("image_reward", model=str(folder))(IMAGES, PROMPTS, [{} for _ in IMAGES])
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for text in TEXTS:
        own = [score for score, prompt in zip(expected, PROMPTS, strict=True) if prompt == text]
        assert max(own) - min(own) > 1e-2, "images are told apart"
    one = [by_hand.score(IMAGES[0], text) for text in TEXTS]
    assert min(np.diff(sorted(one))) > 1e-2, "and prompts"


def test_an_image_of_another_size_is_scaled_and_cut(folder: Path) -> None:
    wide = np.kron(IMAGES[0], np.ones((2, 3, 1), np.uint8))
    scaled = Image.fromarray(wide).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    reward = get_reward("image_reward", model=str(folder))
    assert reward([wide], TEXTS[:1], [{}]) == pytest.approx(reward([np.asarray(scaled)], TEXTS[:1], [{}]), abs=1e-4)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("owned",))


def test_a_file_that_would_run_code_or_is_another_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"give reward\.model\.image_reward=FOLDER"):
        get_reward("image_reward")
    whole = published()
    for saved, problem in (
        ({**whole, "blip.visual_encoder.norm.weight": Evil()}, "cannot be read"),
        ({"weight": torch.zeros(1)}, r"no weights whose names begin with blip\.visual_encoder\."),
        ({name: value for name, value in whole.items() if "crossattention" not in name}, "Missing key|Error"),
        ({name: value for name, value in whole.items() if not name.startswith("mlp.")}, r"begin with mlp\.layers\."),
    ):
        with pytest.raises(UserError, match=rf"reward image_reward: .*({problem}).*expected ImageReward\.pt"):
            get_reward("image_reward", model=str(write(tmp_path, saved)))
    assert "owned" not in capsys.readouterr().out
    (write(tmp_path, whole) / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no vocab\.txt"):
        get_reward("image_reward", model=str(tmp_path))


def test_plan_counts_the_file_or_what_is_published(folder: Path) -> None:
    def planned(*words: str) -> int | None:
        return sizes.model_bytes(compose(["experiment=nano_ocr", "reward=image_reward", *words]))["image_reward"]

    used = sum(value.numel() * 4 for value in published().values() if value.dtype == torch.float32)
    found = planned(f"reward.model.image_reward={folder}")
    assert found is not None and used <= found < used + 1000 * len(published())
    with torch.device("meta"):
        large = BlipVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
        )
        towers = [BlipVisionModel(large), BlipTextModel(BlipTextConfig(encoder_hidden_size=1024), add_pooling_layer=False)]
        head = torch.nn.Sequential(*starmap(torch.nn.Linear, pairwise(sizes.HEAD_WIDTHS)))
    parameters = sum(one.numel() for module in (*towers, head) for one in module.parameters())
    assert planned() == 4 * parameters
    assert planned("reward.model.image_reward=/nowhere") is None
