"""The nano Wan2.2: its scenes, its data, its build and its shipped checkpoint. One thread, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import CollateConfig, SamplingConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.prompts import load_prompts
from omni_rollout.errors import UserError
from omni_rollout.launch.model_files import problems
from omni_rollout.models.wan2_2.spec import EXPERTS, resolve
from omni_rollout.nano.wan import scenes
from omni_rollout.nano.wan.build import assemble, build
from omni_rollout.nano.wan.data import write_data
from omni_rollout.nano.wan.evaluate import FLOW_SHIFT, MOVED, accuracy
from omni_rollout.nano.wan.training import (
    BOUNDARY,
    PROMPT_WIDTH,
    Experts,
    WanSettings,
    encode_scenes,
    make_experts,
    velocity,
    videos_loss,
)
from omni_rollout.nano.wan.vae import WanVaeSettings, grown, to_pixels
from omni_rollout.rewards import get_reward
from omni_rollout.rewards.base.contract import texts_and_columns

ROOT = Path(__file__).parents[2]
RECIPE, NANO = ROOT / "recipes" / "nano_wan", ROOT / "recipes" / "nano"
MEGABYTE = 1_000_000
TINY_VAE = WanVaeSettings(steps=2, batch=2, statistics_scenes=2, evaluation_scenes=2)
TINY = WanSettings(
    layers=1, scenes=4, batch=2, max_steps=4, evaluate_from=2, evaluate_every=2, evaluation_images=2, second_look_images=2
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vae")
    grown(AutoencoderKLQwenImage.from_pretrained(NANO / "checkpoint" / "vae")).save_pretrained(folder)
    return assemble(folder, TINY, seed=0)


# ---- scenes and data


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_a_scene_moves_as_it_says_and_never_leaves_the_frame(seed: int) -> None:
    for scene in scenes.sample_scenes(3, seed):
        video = scenes.film(scene)
        assert (scene.digit, scene.color, scene.direction) not in scenes.HELD_OUT
        ink = (video != np.array(scene.background, np.uint8)).any(axis=-1)
        lefts = np.array([np.flatnonzero(frame.any(axis=0))[0] for frame in ink])
        assert (np.diff(lefts) == scenes.DIRECTIONS[scene.direction] * scene.speed).all()
        assert not ink[:, 0].any() and not ink[:, -1].any() and not ink[..., 0].any() and not ink[..., -1].any()


def test_every_word_of_a_held_out_prompt_is_trained() -> None:
    assert not set(scenes.HELD_OUT) & set(scenes.TRAIN) and len(scenes.HELD_OUT) == 20
    for place in range(3):
        assert {task[place] for task in scenes.TRAIN} == {task[place] for task in scenes.TASKS}


def test_the_shipped_data_are_what_the_code_writes(tmp_path: Path) -> None:
    write_data(tmp_path)
    for split in ("train", "heldout"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (RECIPE / "data" / f"{split}.jsonl").read_bytes()
        get_reward("displacement").check(*texts_and_columns(load_prompts(tmp_path / f"{split}.jsonl")))


# ---- growing and training


def test_the_vae_begins_by_drawing_stills_as_nanos_does() -> None:
    old = AutoencoderKLQwenImage.from_pretrained(NANO / "checkpoint" / "vae")
    video = to_pixels(scenes.sample_scenes(1, 0))[:, :, :1]
    still = video.expand(-1, -1, scenes.FRAMES, -1, -1)
    with torch.no_grad():
        drawn = old.decode(old.encode(video).latent_dist.mode()).sample
        made = grown(old)
        latents = made.encode(still).latent_dist.mode()
        assert latents.shape[2] == 2
        first = made.decode(latents[:, :, :1]).sample
    assert torch.equal(first, drawn), "a single frame is a picture of nano's"


def test_each_expert_learns_its_own_times() -> None:
    """What either is told; and a network that answers noise - latents leaves no loss."""
    seen: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    data: Any = type("Videos", (), {})()
    data.latents, data.prompt_embeds = torch.randn(4, 16, 2, 6, 8, generator=generator), torch.zeros(4, PROMPT_WIDTH, 64)
    big = WanSettings(batch=64)

    def expert(name: str) -> Any:
        def network(*, hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            seen[name] = timestep / 1000
            return (torch.zeros_like(hidden_states),)

        return network

    loss = videos_loss({name: expert(name) for name in EXPERTS}, data, big, generator)  # type: ignore[arg-type]
    first, second = (seen[name] for name in EXPERTS)
    assert bool((first >= BOUNDARY).all()) and bool((first <= 1).all()) and first.max() - first.min() > 0.1
    assert bool((second < BOUNDARY).all()) and bool((second > 0).all()) and second.min() < 0.3 < 0.8 < second.max()
    assert 3 < float(loss) < 5, "of noise - latents, each of variance 1, for two experts that answer 0"


def test_the_answer_hangs_on_the_words(pipeline: Any) -> None:
    made = [scenes.cases([("4", "red", way)], 1)[0] for way in scenes.DIRECTIONS]
    told = encode_scenes(pipeline, made)
    expert: Any = make_experts(TINY, 0)["transformer"]
    latents = torch.randn(1, *told.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [velocity(expert, latents, torch.tensor([0.7]), told.prompt_embeds[row : row + 1]) for row in range(2)]
    assert answers[0].shape == latents.shape and not torch.equal(*answers)


@pytest.mark.slow
def test_build_leaves_a_whole_checkpoint_and_repeats_itself(random_checkpoint: Path, tmp_path: Path) -> None:
    weights, parts = [], ("vae", *EXPERTS)
    for name in ("first", "second"):
        checkpoint = build(
            tmp_path / name, vae_settings=TINY_VAE, settings=TINY, start=random_checkpoint, threads=torch.get_num_threads()
        )
        assert not list(problems(checkpoint, "wan2_2"))
        weights.append([(checkpoint / part / "diffusion_pytorch_model.safetensors").read_bytes() for part in parts])
    assert weights[0] == weights[1] and weights[0][1] != weights[0][2]
    numbers = json.loads((tmp_path / "first" / "NUMBERS.json").read_text())
    assert [state["step"] for state in numbers["experts"]["measured"]["evaluations"]] == [2, 4]
    assert set(numbers["shipped"]) == {"held_out", "trained"}


def test_a_start_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no nano Qwen-Image to start from"):
        build(tmp_path, start=tmp_path / "nowhere")


# ---- shipped checkpoint


def test_shipped_checkpoint_is_whole_and_small() -> None:
    checkpoint = RECIPE / "checkpoint"
    assert not list(problems(checkpoint, "wan2_2"))
    files = [path for path in RECIPE.rglob("*") if path.is_file() and not path.is_relative_to(RECIPE / "stages")]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    origins = [json.loads(path.read_text()).get("_name_or_path") for path in files if path.name == "config.json"]
    assert not any(origins), f"the checkpoint names the folder it was built in: {origins}"


def test_every_shipped_prompt_fits_the_width() -> None:
    tokenizer = WanPipeline.from_pretrained(RECIPE / "checkpoint").tokenizer
    extra = {"frames": scenes.FRAMES, "flow_shift": FLOW_SHIFT}
    sampling = SamplingConfig(height=scenes.HEIGHT, width=scenes.WIDTH, true_cfg_scale=1.0, num_inference_steps=10, extra=extra)
    collator = Collator("wan2_2", tokenizer, sampling, CollateConfig(prompt_width=PROMPT_WIDTH))
    for split in ("train", "heldout"):
        for prompt in load_prompts(RECIPE / "data" / f"{split}.jsonl"):
            collator.check(collator.spec(), prompt)
    spec = resolve({"num_inference_steps": 10, "extra": extra})
    assert spec.extra["boundary_step"] == 4, "the recipe's noise falls on two steps of each expert"


def test_shipped_model_moves_held_out_digits_about_half_the_time() -> None:
    pipeline = WanPipeline.from_pretrained(RECIPE / "checkpoint", torch_dtype=torch.float32)
    result = accuracy(pipeline, Experts({name: getattr(pipeline, name) for name in EXPERTS}), 60, seed=7)
    low, high = WanSettings().window
    # Three standard errors (6.5 points each at 60 videos) around the window.
    assert low - 0.2 <= result[MOVED] <= high + 0.2, result
