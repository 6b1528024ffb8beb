"""The nano model: its renderer, its parts, its random and its shipped checkpoint. One thread, no network."""

import json
import random
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from omni_rollout.nano import evaluate, render
from omni_rollout.nano.build import BuildSettings, build, choose_state, write_data
from omni_rollout.nano.components import make_vae, rope_axes
from omni_rollout.nano.ocr import exact_matches
from omni_rollout.nano.random_weights import build_random
from omni_rollout.nano.stages import run_stage
from omni_rollout.nano.tokenizer import PREFIX_TOKENS, PROMPT_WIDTH, TEMPLATE, make_tokenizer
from omni_rollout.nano.transformer import TransformerSettings, embed_prompts, learning_rate
from omni_rollout.nano.vae import VaeSettings, decode_frame, encode_frame, reconstruct, single_frame_path, to_images, to_pixels

RECIPE = Path(__file__).parents[2] / "recipes" / "nano"
MEGABYTE = 1_000_000

texts = st.sampled_from((*render.NUMBERS, *render.DIGITS, *render.WORDS))
colors = st.sampled_from(sorted(render.COLORS))
cpu = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def shipped() -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(RECIPE / "checkpoint", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def signs(count: int, seed: int = 0) -> list[render.Sign]:
    rng = random.Random(seed)
    return [render.sample_sign(rng, text, color) for text, color in evaluate.cases(render.NUMBERS[::7], count)]


# ---- data


def test_held_out_numbers_are_never_trained_on_and_every_digit_is_seen_in_both_places() -> None:
    assert len(set(render.HELD_OUT)) == 15
    assert not set(render.HELD_OUT) & set(render.TRAIN_NUMBERS)
    for place in (0, 1):
        assert {number[place] for number in render.TRAIN_NUMBERS} == set(render.DIGITS)


@given(seed=st.integers(0, 2**32))
def test_sampled_training_text_is_never_held_out(seed: int) -> None:
    rng = random.Random(seed)
    assert render.sample_text(rng) not in render.HELD_OUT


@given(text=texts, color=colors, seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_drawing_repeats_itself_and_shows_the_colour_inside_the_image(text: str, color: str, seed: int) -> None:
    sign = render.sample_sign(random.Random(seed), text, color)
    image = render.draw(sign)
    assert image.shape == (render.IMAGE_SIZE, render.IMAGE_SIZE, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render.draw(sign))
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (edge == np.array(sign.background)).all(), "the text touches the edge"
    assert render.nearest_color(render.glyph_color(image)) == color


def test_ocr_reads_the_renderings() -> None:
    rng = random.Random(0)
    asked = evaluate.cases((*render.NUMBERS[::4], *render.DIGITS, *render.WORDS), 50)
    images = [render.draw(render.sample_sign(rng, text, color)) for text, color in asked]
    assert np.mean(exact_matches(images, [text for text, _ in asked])) >= 0.98


def test_prompt_files_split_the_numbers(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    assert {row["text"] for row in rows["heldout"]} == set(render.HELD_OUT)
    assert {row["text"] for row in rows["train"]} == set(render.TRAIN_NUMBERS)
    assert all(row["prompt"] == render.prompt_for(row["text"], row["color"]) for part in rows.values() for row in part)


# ---- tokenizer


def test_template_is_the_pipelines_and_its_prefix_has_34_tokens(tokenizer: Qwen2Tokenizer, random_checkpoint: Path) -> None:
    pipeline = QwenImagePipeline.from_pretrained(random_checkpoint, local_files_only=True)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == PREFIX_TOKENS
    assert len(tokenizer(TEMPLATE.split("{}")[0]).input_ids) == PREFIX_TOKENS


def test_digits_and_words_are_single_tokens(tokenizer: Qwen2Tokenizer) -> None:
    for text in (*render.DIGITS, *render.WORDS):
        assert len(tokenizer(text).input_ids) == 1, text
    assert len(tokenizer("42").input_ids) == 2


@given(text=texts, color=colors)
def test_every_prompt_fits_the_fixed_width(tokenizer: Qwen2Tokenizer, text: str, color: str) -> None:
    ids = tokenizer(TEMPLATE.format(render.prompt_for(text, color))).input_ids
    assert len(ids) - PREFIX_TOKENS <= PROMPT_WIDTH


@given(text=st.text(max_size=40))
def test_any_text_survives_the_tokenizer(tokenizer: Qwen2Tokenizer, text: str) -> None:
    decoded = tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False)
    assert decoded == unicodedata.normalize("NFC", text)


# ---- parts


@given(head_dim=st.integers(4, 64).map(lambda half: 2 * half))
def test_rope_axes_are_even_and_fill_the_head(head_dim: int) -> None:
    axes = rope_axes(head_dim)
    assert sum(axes) == head_dim and all(axis > 0 and axis % 2 == 0 for axis in axes)


def test_rope_axes_are_the_real_models_at_128_and_refuse_odd_heads() -> None:
    assert rope_axes(128) == (16, 56, 56)
    with pytest.raises(ValueError, match="head_dim=33"):
        rope_axes(33)


def test_single_frame_path_is_the_librarys_function_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    vae = make_vae(base_dim=8, dim_mult=(1, 2, 4, 4)).requires_grad_(False)
    pixels = to_pixels([render.draw(sign) for sign in signs(3)])
    library_mean = vae.encode(pixels, return_dict=False)[0].mode()
    library_pixels = vae.decode(library_mean, return_dict=False)[0]
    with single_frame_path(vae):
        mean, _ = encode_frame(vae, pixels)
        restored = decode_frame(vae, mean).clamp(-1, 1)
        with pytest.raises(ValueError, match="one frame"):
            encode_frame(vae, pixels.expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(mean, library_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restored, library_pixels, rtol=1e-4, atol=2e-5)
    assert not any("forward" in vars(module) for module in vae.modules())
    assert torch.equal(vae.encode(pixels, return_dict=False)[0].mode(), library_mean)


def test_pixels_and_images_are_inverse() -> None:
    images = [render.draw(sign) for sign in signs(4)]
    assert all(np.array_equal(a, b) for a, b in zip(images, to_images(to_pixels(images)), strict=True))


def test_learning_rate_warms_up_then_falls() -> None:
    asked = TransformerSettings()
    rates = [learning_rate(asked, step) for step in range(0, asked.cosine_steps)]
    assert rates[0] < rates[50] < rates[asked.warmup_steps]
    assert max(rates) <= asked.learning_rate and rates[-1] < 0.1 * asked.learning_rate


# ---- build


def test_first_state_twice_inside_the_window_is_chosen_else_the_closest() -> None:
    def states(*looks: tuple[float, float | None]) -> list[dict[str, Any]]:
        return [
            {"step": 100 * i, "exact_match": first} | ({} if second is None else {"second_look": {"exact_match": second}})
            for i, (first, second) in enumerate(looks, start=1)
        ]

    assert choose_state(states((0.1, None), (0.45, 0.3), (0.55, 0.41), (0.5, 0.5)), (0.4, 0.6)) == 300
    assert choose_state(states((0.1, None), (0.45, 0.3), (0.38, None)), (0.4, 0.6)) == 200
    assert choose_state(states((0.1, None), (0.8, None)), (0.4, 0.6)) == 200


def test_build_leaves_a_loadable_checkpoint_and_repeats_itself(tmp_path: Path) -> None:
    tiny = BuildSettings(
        vae=VaeSettings(crop_steps=2, full_steps=1, crop_batch=2, full_batch=2, statistics_images=32, evaluation_images=2),
        transformer=TransformerSettings(
            layers=1, images=64, batch=4, max_steps=4, evaluate_from=2, evaluate_every=2, evaluation_images=2
        ),
        report_images=2,
    )
    weights = []
    for name in ("first", "second"):
        checkpoint = build(tmp_path / name, settings=tiny, threads=torch.get_num_threads())
        QwenImagePipeline.from_pretrained(checkpoint, local_files_only=True)
        weights.append((checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    numbers = json.loads((tmp_path / "first" / "NUMBERS.json").read_text())
    assert [state["step"] for state in numbers["transformer"]["measured"]["evaluations"]] == [2, 4]
    assert numbers["shipped_step"] in (2, 4)
    assert (tmp_path / "first" / "stages" / "transformer" / "step_00002").is_dir()


def test_a_stage_is_reused_only_for_the_same_request(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(folder: Path) -> dict[str, int]:
        calls.append(len(list(folder.iterdir())))
        (folder / "result").write_text("x")
        return {"calls": len(calls)}

    asked = {"seed": 0, "settings": asdict(TransformerSettings())}
    assert run_stage(tmp_path / "stage", asked, work)["measured"] == {"calls": 1}
    assert run_stage(tmp_path / "stage", asked, work)["measured"] == {"calls": 1}
    assert run_stage(tmp_path / "stage", {**asked, "seed": 1}, work)["measured"] == {"calls": 2}
    (tmp_path / "stage" / "stage.json").unlink()
    run_stage(tmp_path / "stage", {**asked, "seed": 1}, work)
    assert calls == [0, 0, 0], "each run must find an empty folder"


# ---- random checkpoint


def test_random_checkpoint_generates_an_image_that_depends_on_the_prompt(random_checkpoint: Path) -> None:
    pipeline = QwenImagePipeline.from_pretrained(random_checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [render.prompt_for("42", "red"), render.prompt_for("17", "red")]
    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    images = pipeline(
        prompt=prompts,
        negative_prompt=[" ", " "],
        true_cfg_scale=2.0,
        height=64,
        width=64,
        num_inference_steps=2,
        latents=noise,
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()
    assert not torch.equal(images[0], images[1])


def test_random_checkpoint_is_float32_without_degenerate_weights_and_repeats_itself(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    pipeline = QwenImagePipeline.from_pretrained(random_checkpoint, local_files_only=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for name, parameter in part.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.numel() == 1 or parameter.std() > 0, name
    again = build_random(tmp_path / "again")
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (again / file).read_bytes() == (random_checkpoint / file).read_bytes()


def test_random_checkpoint_of_another_size(tmp_path: Path) -> None:
    out = build_random(tmp_path / "big", layers=3, heads=2, head_dim=48, joint_dim=96, seed=5)
    config = QwenImagePipeline.from_pretrained(out, local_files_only=True).transformer.config
    assert (config.num_layers, config.num_attention_heads, config.joint_attention_dim) == (3, 2, 96)
    with pytest.raises(ValueError, match="multiple of 32"):
        build_random(tmp_path / "bad", joint_dim=60)


# ---- shipped checkpoint


def test_shipped_checkpoint_is_small_and_float32(shipped: QwenImagePipeline) -> None:
    files = [path for path in (RECIPE / "checkpoint").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30 * MEGABYTE
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    origins = [json.loads(path.read_text()).get("_name_or_path") for path in files if path.name == "config.json"]
    assert not any(origins), f"the checkpoint names the folder it was built in: {origins}"
    for part in (shipped.transformer, shipped.vae, shipped.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_shipped_tokenizer_is_the_one_the_code_builds(shipped: QwenImagePipeline, tokenizer: Qwen2Tokenizer) -> None:
    assert shipped.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_shipped_model_reads_held_out_numbers_about_half_the_time(shipped: QwenImagePipeline) -> None:
    asked = evaluate.cases(render.HELD_OUT, 60)
    result = evaluate.accuracy(shipped, asked, seed=7)
    low, high = TransformerSettings().window
    # Three standard errors (6.5 points each at 60 images) around the window.
    assert low - 0.2 <= result["exact_match"] <= high + 0.2, result
    assert result["right_color"] >= 0.7, result


def test_shipped_model_does_not_depend_on_the_prompts_padding(shipped: QwenImagePipeline) -> None:
    """Training and serving pad prompts to the fixed width; the stock pipeline pads to the longest of the batch."""
    natural, mask = shipped.encode_prompt([render.prompt_for("42", "red")], device=cpu)
    assert mask is None and natural.shape[1] < PROMPT_WIDTH
    padded, padded_mask = embed_prompts(shipped, [render.prompt_for("42", "red")], PROMPT_WIDTH)
    latents = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    velocities = [
        shipped.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=embeds_mask,
            timestep=torch.tensor([0.7]),
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0].detach()
        for embeds, embeds_mask in ((natural, None), (padded, padded_mask))
    ]
    torch.testing.assert_close(velocities[0], velocities[1], rtol=1e-4, atol=1e-5)


def test_shipped_vae_keeps_text_and_colour(shipped: QwenImagePipeline) -> None:
    drawn = signs(24, seed=3)
    images = to_images(reconstruct(shipped.vae, to_pixels([render.draw(sign) for sign in drawn])))
    assert np.mean(exact_matches(images, [sign.text for sign in drawn])) >= 0.95
    found = [render.nearest_color(render.glyph_color(image)) for image in images]
    assert np.mean([name == sign.color for name, sign in zip(found, drawn, strict=True)]) >= 0.95
