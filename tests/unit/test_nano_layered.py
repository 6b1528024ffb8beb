"""The nano Qwen-Image-Layered: its layers, its data, its build and its shipped checkpoint. One thread, no network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.config import CollateConfig, SamplingConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import load_prompts
from omni_rollout.errors import UserError
from omni_rollout.launch.model_files import problems
from omni_rollout.nano import render
from omni_rollout.nano.layered import pictures
from omni_rollout.nano.layered.build import build
from omni_rollout.nano.layered.data import write_data
from omni_rollout.nano.layered.evaluate import LAYERED, accuracy
from omni_rollout.nano.layered.training import FRAMES, TOKENS, LayeredSettings, encode_signs, grown, layered_loss, velocity
from omni_rollout.nano.layered.vae import CHANNELS, LayeredVaeSettings, frames
from omni_rollout.nano.layered.vae import grown as grown_vae
from omni_rollout.nano.tokenizer import PROMPT_WIDTH
from omni_rollout.rewards import get_reward
from omni_rollout.rewards.base.contract import texts_and_columns
from omni_rollout.rewards.recomposition import recomposed

ROOT = Path(__file__).parents[2]
RECIPE, NANO = ROOT / "recipes" / "nano_layered", ROOT / "recipes" / "nano"
MEGABYTE = 1_000_000
TINY_VAE = LayeredVaeSettings(steps=2, signs=2, statistics_signs=4, evaluation_signs=2)
TINY = LayeredSettings(
    signs=8, batch=2, max_steps=4, evaluate_from=2, evaluate_every=2, evaluation_images=2, second_look_images=2
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return QwenImagePipeline.from_pretrained(NANO / "checkpoint")


# ---- layers and data


@given(seed=st.integers(0, 2**32), text=st.sampled_from(render.NUMBERS), color=st.sampled_from(list(render.COLORS)))
@settings(deadline=None, max_examples=50)
def test_the_layers_are_the_picture(seed: int, text: str, color: str) -> None:
    sign = pictures.sample_sign(random.Random(seed), text, color)
    laid = recomposed(np.stack(pictures.layers(sign)))
    assert np.abs(laid - render.draw(sign)).max() <= 2, "but for rounding"


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_no_training_sign_shows_a_held_out_number(seed: int) -> None:
    assert not {sign.text for sign in pictures.sample_signs(20, seed)} & set(render.HELD_OUT)


def test_the_data_split_the_numbers_and_can_be_scored(tmp_path: Path) -> None:
    write_data(tmp_path)
    prompts = {split: load_prompts(tmp_path / f"{split}.jsonl") for split in ("train", "heldout")}
    numbers = {split: {prompt.metadata["text"] for prompt in rows} for split, rows in prompts.items()}
    assert numbers["heldout"] == set(render.HELD_OUT) and numbers["train"] == {*render.TRAIN_NUMBERS, *render.DIGITS}
    reward = get_reward("matte")
    for rows in prompts.values():
        reward.check(*texts_and_columns(rows))


def test_the_shipped_data_are_what_the_code_writes(tmp_path: Path) -> None:
    write_data(tmp_path)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {path.relative_to(RECIPE / "data") for path in (RECIPE / "data").rglob("*") if path.is_file()}
    for file in files:
        if file.suffix == ".png":  # compressed otherwise by another zlib
            assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(Image.open(RECIPE / "data" / file))), file
        else:
            assert (tmp_path / file).read_bytes() == (RECIPE / "data" / file).read_bytes()


# ---- growing and training


def test_what_is_grown_computes_what_it_did(pipeline: Any) -> None:
    """The VAE draws the same colours, opaque; the transformer the same velocity for frame 0 as long as no layer stands by."""
    vae, wider = pipeline.vae, grown_vae(pipeline.vae)
    pixels = frames(pictures.sample_signs(1, 0))[:1]
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels[:, :3]).latent_dist.mode()).sample
        after = wider.decode(wider.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(after[:, :3], before)
    assert wider.config["input_channels"] == CHANNELS and bool((after[:, 3] == 1).all())
    transformer = grown(pipeline.transformer)
    assert not transformer.state_dict()["time_text_embed.addition_t_embedding.weight"].any()
    old = pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, transformer.state_dict()[name]) for name, tensor in old.items())


def test_the_answer_hangs_on_the_picture_and_on_the_words(pipeline: Any) -> None:
    signs = [
        pictures.sample_sign(random.Random(0), text, color) for text, color in (("42", "red"), ("42", "blue"), ("17", "red"))
    ]
    told = encode_signs(pipeline, grown_vae(pipeline.vae), signs)
    latents = torch.randn(1, FRAMES * TOKENS, 64, generator=torch.Generator().manual_seed(0))
    transformer, row = grown(pipeline.transformer), torch.tensor([0])
    with torch.no_grad():
        answers = [velocity(transformer, latents, torch.tensor([0.7]), told, row + place) for place in range(3)]
    assert answers[0].shape == latents.shape
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_the_loss_is_the_error_of_the_velocity(pipeline: Any) -> None:
    """A network that answers with what is left of the target: noise - latents, to the last digit."""
    data = encode_signs(pipeline, grown_vae(pipeline.vae), pictures.sample_signs(3, 0))
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, (2,), generator=generator)
    right = torch.randn(2, FRAMES * TOKENS, 64, generator=generator) - data.latents[rows]

    def network(**inputs: Any) -> tuple[torch.Tensor]:
        assert torch.equal(inputs["hidden_states"][:, FRAMES * TOKENS :], data.latents[rows][:, :TOKENS]), "the whole picture"
        assert inputs["additional_t_cond"].tolist() == [0, 0]
        return (torch.cat([right, torch.full_like(right[:, :TOKENS], 9.0)], dim=1),)

    assert layered_loss(network, data, TINY, torch.Generator().manual_seed(5)) == 0.0  # type: ignore[arg-type]


@pytest.mark.slow
def test_build_leaves_a_whole_checkpoint_and_repeats_itself(random_checkpoint: Path, tmp_path: Path) -> None:
    weights = []
    for name in ("first", "second"):
        checkpoint = build(
            tmp_path / name,
            vae_settings=TINY_VAE,
            settings=TINY,
            start=random_checkpoint,
            threads=torch.get_num_threads(),
        )
        assert not list(problems(checkpoint, "qwen_image_layered"))
        weights.append(
            [(checkpoint / part / "diffusion_pytorch_model.safetensors").read_bytes() for part in ("vae", "transformer")]
        )
    assert weights[0] == weights[1]
    same_text_encoder(tmp_path / "first" / "checkpoint", random_checkpoint)
    numbers = json.loads((tmp_path / "first" / "NUMBERS.json").read_text())
    assert [state["step"] for state in numbers["transformer"]["measured"]["evaluations"]] == [2, 4]
    assert set(numbers["shipped"]) == {"held_out", "train_numbers", "one_digit"}


def test_a_start_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no nano Qwen-Image to start from"):
        build(tmp_path, start=tmp_path / "nowhere")


# ---- shipped checkpoint


def same_text_encoder(checkpoint: Path, start: Path) -> None:
    for part in ("text_encoder", "tokenizer"):
        names = sorted(path.name for path in (start / part).iterdir())
        assert names == sorted(path.name for path in (checkpoint / part).iterdir())
        assert all((checkpoint / part / name).read_bytes() == (start / part / name).read_bytes() for name in names)


def test_shipped_checkpoint_is_whole_and_small() -> None:
    checkpoint = RECIPE / "checkpoint"
    assert not list(problems(checkpoint, "qwen_image_layered"))
    same_text_encoder(checkpoint, NANO / "checkpoint")  # so that git keeps it once
    files = [path for path in RECIPE.rglob("*") if path.is_file() and not path.is_relative_to(RECIPE / "stages")]
    assert sum(path.stat().st_size for path in files) <= 17 * MEGABYTE
    origins = [json.loads(path.read_text()).get("_name_or_path") for path in files if path.name == "config.json"]
    assert not any(origins), f"the checkpoint names the folder it was built in: {origins}"


def test_every_shipped_prompt_fits_the_width(pipeline: Any) -> None:
    sampling = SamplingConfig(true_cfg_scale=1.0, extra={"layers": pictures.LAYERS, "resolution": render.IMAGE_SIZE})
    collator = Collator("qwen_image_layered", pipeline.tokenizer, sampling, CollateConfig(prompt_width=PROMPT_WIDTH))
    for split in ("train", "heldout"):
        for prompt in load_prompts(RECIPE / "data" / f"{split}.jsonl"):
            spec = collator.spec(images=prompt.images)
            collator.check(spec, prompt)
            assert (spec.height, spec.width) == (64, 64)


def test_shipped_model_lays_off_held_out_numbers_about_half_the_time(pipeline: Any) -> None:
    whole: Any = {"torch_dtype": torch.float32}
    vae = AutoencoderKLQwenImage.from_pretrained(RECIPE / "checkpoint" / "vae", **whole)
    transformer = QwenImageTransformer2DModel.from_pretrained(RECIPE / "checkpoint" / "transformer", **whole)
    result = accuracy(pipeline, vae, transformer, 60, seed=7)
    low, high = LayeredSettings().window
    # Three standard errors (6.5 points each at 60 images) around the window.
    assert low - 0.2 <= result[LAYERED] <= high + 0.2, result
