"""A video on its way: saved, shown, logged, kept in the journal and handed to verl, its pixels once."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_rollout.config import WandbConfig
from omni_rollout.models import family_module
from omni_rollout.monitor import wandb_sink
from omni_rollout.trajectories.capsule import CapsuleError, load_capsule, save_capsule
from omni_rollout.trajectories.journal import Journal
from omni_rollout.trajectories.media import animated, save_media
from omni_rollout.trajectories.sheet import image_grid
from omni_rollout.types import InputImage, Prompt, Trajectory

IMAGE = InputImage(path="a.png", sha256="0" * 64, height=30, width=50)


def video(family: str = "wan2_2", frames: int = 9, **sampling: Any) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    images = (IMAGE,) if family == "wan2_2_i2v" else ()
    sizes = {"height": 64, "width": 32, "num_inference_steps": 4, "true_cfg_scale": 1.0, "prompt_width": 4}
    spec_of = family_module(family, "spec")
    spec = spec_of.resolve({**sizes, "extra": {"frames": frames}, **sampling}, images)
    layout = spec_of.layout(spec)
    schedule = spec_of.schedule(spec, {})
    text = torch.randn(4, 8, generator=generator)
    guided = {"negative_prompt_embeds": text, "negative_prompt_embeds_mask": torch.ones(4, dtype=torch.bool)}
    return Trajectory(
        latents=torch.randn(4, *layout.latent, generator=generator),
        log_probs=torch.randn(3, generator=generator),
        step_indices=torch.tensor(spec.step_indices),
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        prompt_embeds=text,
        prompt_embeds_mask=torch.ones(4, dtype=torch.bool),
        **(guided if spec.guided else dict.fromkeys(guided)),  # type: ignore[arg-type]
        conditions={name: torch.randn(shape, generator=generator) for name, shape in layout.conditions.items()},  # type: ignore[arg-type]
        media=np.random.default_rng(0).integers(0, 256, layout.media, np.uint8),
        prompt=Prompt(text="a cat", images=images),
        spec=spec,
        seed=0,
        group_id="g",
        member=0,
        policy_version=0,
        fingerprint={"dtype": "float32"},
    )


def frames_of(source: Any) -> np.ndarray:
    with Image.open(source) as opened:
        found = []
        for number in range(getattr(opened, "n_frames", 1)):
            opened.seek(number)
            found.append(np.asarray(opened.convert("RGB")))
    return np.stack(found)


@pytest.mark.parametrize("frames", [1, 5])
def test_a_video_is_saved_as_it_is(tmp_path, frames):
    (path,) = save_media(video(frames=frames), tmp_path / "v.0")
    assert path.name == "v.0.webp" and np.array_equal(frames_of(path), video(frames=frames).media)


def test_the_sheet_shows_the_first_middle_and_last_frame():
    media = np.zeros((9, 64, 32, 3), np.uint8)
    media[0], media[4], media[8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    sheet = np.asarray(image_grid([("a", media)]))
    assert [bool((sheet == colour).all(-1).sum() >= 64 * 32) for colour in np.eye(3, dtype=int) * 255] == [True] * 3


def test_wandb_gets_a_file_that_plays(monkeypatch, tmp_path):
    logged: dict[str, Any] = {}
    fake: Any = SimpleNamespace(
        Image=lambda array, caption: ("image", caption, array),
        Video=lambda data, caption, format: ("video", caption, format, data.read()),
    )
    sink = wandb_sink.WandbSink(tmp_path, WandbConfig(mode="disabled"), {}, {})
    sink._wandb, sink._run = fake, SimpleNamespace(log=lambda values, step: logged.update(values))
    media = [("v", video().media), ("i", np.zeros((8, 8, 3), np.uint8)), ("l", np.zeros((2, 8, 8, 4), np.uint8))]
    sink.log(1, {}, {"training": media})
    ((kind, caption, form, data),) = logged["videos/training"]
    assert (kind, caption, form) == ("video", "v", "gif") and len(frames_of(io.BytesIO(data))) == 9
    assert [(caption, array.shape) for _, caption, array in logged["images/training"]] == [("i", (8, 8, 3)), ("l", (8, 16, 3))]


def test_a_gif_has_every_frame_even_where_two_are_alike():
    still = np.repeat(video(frames=1).media, 5, axis=0)
    still[3:] = 255 - still[3:]
    assert len(frames_of(io.BytesIO(animated(video().media, "GIF")))) == 9
    with Image.open(io.BytesIO(animated(still, "GIF"))) as opened:  # a frame that repeats another makes it last longer
        duration = 0
        for number in range(opened.n_frames):  # type: ignore[attr-defined]
            opened.seek(number)
            duration += opened.info["duration"]
    assert duration == 5 * 60


def test_the_journal_and_verl_carry_the_pixels_once(tmp_path):
    from omni_rollout.integrations.verl import agent_loop

    trajectory = video(frames=41)
    pixels = trajectory.media.nbytes
    journal = Journal(tmp_path)
    journal.keep(1, trajectory)
    ((path,),) = ([*tmp_path.rglob("*.safetensors")],)
    rest = trajectory.latents.nbytes + 20_000
    assert pixels < path.stat().st_size < pixels + rest < 2 * pixels
    sample = agent_loop.to_sample(trajectory, {"reward_score": 0.0, "reward_extra_info": {}, "failures": []}, 1, "train")
    assert pixels < len(pickle.dumps(sample)) < pixels + rest + 20_000


@pytest.mark.parametrize("family", ["wan2_2", "wan2_2_i2v"])
def test_a_capsule_of_a_video(family, tmp_path):
    for scales in ({}, {"true_cfg_scale": 1.0, "extra": {"frames": 9, "true_cfg_scale_2": 2.0}}):
        before = video(family, **scales)
        save_capsule(before, tmp_path / "a.safetensors")
        after = load_capsule(tmp_path / "a.safetensors")
        assert after.spec == before.spec and np.array_equal(after.media, before.media) and after.prompt == before.prompt
        assert all(torch.equal(after.conditions[name], tensor) for name, tensor in before.conditions.items())
    extra = dict(before.spec.extra)
    for change, message in (
        ({"boundary_step": extra["boundary_step"] + 1}, "extra: .*boundary_step"),
        ({"true_cfg_scale_2": None}, "true_cfg_scale: 1.0, with negative_prompt"),
        ({"frames": 5}, r"latents: shape \[4, 16, 3, 8, 4\], expected \[4, 16, 2, 8, 4\]"),
        ({"frames": 6}, "frames=6"),
        ({"true_cfg_scale_2": 1.0}, "true_cfg_scale"),
    ):
        with pytest.raises(CapsuleError, match=message):
            save_capsule(replace(before, spec=replace(before.spec, extra={**extra, **change})), tmp_path / "b.safetensors")
    assert not Path(tmp_path / "b.safetensors").exists()
