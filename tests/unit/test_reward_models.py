"""Rewards that are read off a model, with tiny random weights, against the model's own forward pass and plain arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from omni_rollout.errors import UserError
from omni_rollout.nano import render
from omni_rollout.rewards import WeightedSum, get_reward, jpeg_compressibility, jpeg_incompressibility
from omni_rollout.rewards.base.clip import BATCH
from omni_rollout.rewards.ocr import similarity_inside
from omni_rollout.types import Prompt

SIDE = 32
IMAGES = list(np.random.default_rng(0).integers(0, 256, (BATCH + 3, SIDE, SIDE, 3), np.uint8))
TEXTS = ["a cat" if number % 2 else "two dogs on a table" for number in range(len(IMAGES))]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's published ones


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ends: dict[str, Any] = {"vocab_size": len(words), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**sizes, **ends, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    size = {"shortest_edge": SIDE}
    CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def by_hand(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits of every image and its text, one pair at a time, from pixels normalised here; image embeddings."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    logits, embeddings = [], []
    for image, text in zip(IMAGES, TEXTS, strict=True):
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        pixels = (torch.tensor(image).permute(2, 0, 1)[None] / 255 - mean) / std
        with torch.no_grad():
            out = model(input_ids=tokenizer([text], return_tensors="pt")["input_ids"], pixel_values=pixels)
        logits.append(out.logits_per_image[0, 0])
        embeddings.append(out.image_embeds[0])
    return torch.stack(logits), torch.stack(embeddings)


def test_the_scores_of_clip(clip: Path) -> None:
    logits, _ = by_hand(clip)
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    columns = [{} for _ in IMAGES]
    found = {name: get_reward(name, model=str(clip))(IMAGES, TEXTS, columns) for name in ("pickscore", "clip_score", "hpsv2")}
    assert found["pickscore"] == pytest.approx(logits.tolist(), abs=1e-4)
    assert found["hpsv2"] == pytest.approx((logits / scale).tolist(), abs=1e-5)
    assert found["clip_score"] == pytest.approx([max(100 * value / scale, 0) for value in logits.tolist()], abs=1e-4)
    assert max(logits.tolist()) - min(logits.tolist()) > 1e-2, "the images are told apart"


def test_a_video_gets_the_mean_of_its_frames(clip: Path) -> None:
    lengths = (1, 3, 5)  # of three videos, whose frames are scored in one batch
    videos = [np.stack(IMAGES[sum(lengths[:number]) : sum(lengths[: number + 1])]) for number in range(3)]
    for name in ("pickscore", "clip_score", "hpsv2"):
        reward = get_reward(name, model=str(clip))
        alone = [
            reward(list(video), [text] * len(video), [{}] * len(video)) for video, text in zip(videos, TEXTS, strict=False)
        ]
        expected = [sum(scores) / len(scores) for scores in alone]
        assert reward(videos, TEXTS[:3], [{}] * 3) == pytest.approx(expected, abs=1e-5)
        assert max(expected) > min(expected)
        with pytest.raises(ValueError, match=r"expected a uint8 array \[F, H, W, 3\]"):
            reward([np.zeros((2, 8, 8, 4), np.uint8)], ["a"], [{}])  # layers


def test_the_aesthetic_head(clip: Path) -> None:
    torch.manual_seed(1)
    head = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, clip / "aesthetic.pth")
    with torch.no_grad():
        expected = head(by_hand(clip)[1])[:, 0].tolist()
    found = get_reward("aesthetic", model=str(clip))(IMAGES, TEXTS, [{} for _ in IMAGES])
    assert found == pytest.approx(expected, abs=1e-5)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("owned",))


def test_a_head_that_would_run_code_and_folders_without_a_model_are_refused(clip: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save({"layers.0.weight": Evil()}, tmp_path / "aesthetic.pth")
    with pytest.raises(UserError, match=r"aesthetic\.pth cannot be read"):
        get_reward("aesthetic", model=str(tmp_path))
    assert "owned" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no CLIP model in .*; give reward\.model\.pickscore=FOLDER"):
        get_reward("pickscore", model=str(tmp_path))
    for name in ("aesthetic", "hpsv2", "vlm_judge"):
        with pytest.raises(UserError, match=rf"give reward\.model\.{name}="):
            get_reward(name)
    with pytest.raises(UserError, match=r"reward\.model\.motion=x: this reward is read off no model"):
        get_reward("motion", model="x")


def test_the_published_form_of_ocr() -> None:
    assert similarity_inside("say 42 1", "4 2") == 1.0 and similarity_inside("43", "42") == 0.5
    assert get_reward("ocr_inside")([render.draw(sign("421", "red"))], ['says "42"'], [{}]) == [1.0]
    assert get_reward("ocr")([render.draw(sign("421", "red"))], ['says "42"'], [{}]) == [0.5]


def test_incompressibility_is_compressibility_the_other_way_round() -> None:
    given = (IMAGES[:3], TEXTS[:3], [{}, {}, {}])
    assert jpeg_incompressibility.make(1)(*given) == [-value for value in jpeg_compressibility.make(1)(*given)]


def sign(text: str, color: str) -> render.Sign:
    return render.Sign(text=text, color=color, background=(240, 238, 241), font_size=24, shift=(0, 0))


@pytest.mark.parametrize("color", list(render.COLORS))
def test_a_colour_is_seen_and_no_other(color: str) -> None:
    reward = get_reward("color")
    image = render.draw(sign("42", color))
    texts = [f"a {name} sign" for name in render.COLORS]
    shares = dict(zip(render.COLORS, reward([image] * 6, texts, [{}] * 6), strict=True))
    assert shares.pop(color) == 1.0 and set(shares.values()) == {0.0}
    other = "blue" if color == "red" else "red"
    assert reward([image], [f"a {other} sign"], [{"color": color}]) == [1.0], "metadata has the last word"


def test_half_a_colour_and_a_prompt_without_one() -> None:
    image = np.full((20, 20, 3), 255, np.uint8)
    image[8:12, 4:10], image[8:12, 10:16] = (255, 0, 0), (0, 255, 0)
    assert get_reward("color")([image], ["a red bar"], [{}])[0] == pytest.approx(0.5)
    with pytest.raises(UserError, match="asks for the colour None; expected metadata `color`, one of red"):
        WeightedSum({"color": 1.0}).check([Prompt(text="a bar")], "image")
    assert math.isfinite(get_reward("color")([np.zeros((8, 8, 3), np.uint8)], ["black"], [{}])[0] or 0)
