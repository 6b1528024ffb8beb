"""The whole road for every family: prompts that carry pictures where it takes some, a random model, a simple reward."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.models import families
from omni_rollout.nano.random_weights import build_random
from omni_rollout.train import train

STEPS, MORE_STEPS = 2, 10
SMALL, EDIT = ["sampling.height=32", "sampling.width=64"], ["sampling.extra={vae_area: 4096, vision_area: 4096}"]
VIDEO = ["sampling.extra={frames: 5, flow_shift: 3.0}", "sampling.num_inference_steps=6"]  # steps of both experts
LIMIT = 900  # seconds of one run; a busy machine needs several times what a quiet one does
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/")


@dataclass(frozen=True)
class Own:
    overrides: list[str]
    reward: str
    pictures: tuple[int, int] = (0, 0)  # of the two prompts


OWN = {
    "qwen_image": Own(SMALL, "jpeg_compressibility"),
    "qwen_image_layered": Own(["sampling.extra={layers: 2, resolution: 64}"], "recomposition", (1, 1)),
    "qwen_image_edit": Own(EDIT, "jpeg_compressibility", (1, 1)),
    "qwen_image_edit_plus": Own(EDIT, "jpeg_compressibility", (1, 3)),
    "wan2_2": Own([*SMALL, *VIDEO], "motion"),
    "wan2_2_i2v": Own([*SMALL, *VIDEO], "motion", (1, 1)),
}


def overrides(family: str, folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    """Makes the prompts and the model in `folder`, once."""
    own = OWN[family]
    if not (folder / "model").exists():
        build_random(folder / "model", family=family, seed=1)
        lines = [prompt_line(folder, *words) for words in zip(("a red cat", "a blue dog"), own.pictures, strict=True)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
    return [
        f"model.family={family}",
        f"model.path={folder / 'model'}",
        f"prompts={folder / 'prompts.jsonl'}",
        "model.dtype=bfloat16",
        "collate.prompt_width=48",
        "sampling.num_inference_steps=4",
        "sampling.true_cfg_scale=2.0",
        f"reward={own.reward}",
        "rollout.group_size=3",
        "rollout.prompts_per_step=2",
        f"trainer.steps={steps}",
        "trainer.learning_rate=1e-3",
        "trainer.lora_rank=4",
        "evaluation.images=2",
        "wandb.mode=disabled",
        *own.overrides,
        *more,
    ]


def prompt_line(folder: Path, prompt: str, pictures: int) -> str:
    files = [f"{prompt.split()[1]}{place}.png" for place in range(pictures)]
    for place, file in enumerate(files):
        pixels = np.full((64, 96 - 16 * place, 3), 255, np.uint8)
        pixels[16:48, 16:48] = (40 * place, 200, len(prompt))
        Image.fromarray(pixels).save(folder / file)
    return json.dumps({"prompt": prompt, **({"images": files} if files else {})})


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_exact(run: Path, steps: int) -> None:
    lines = [line for line in steps_of(run) if line["step"] > 0]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
        assert line["parity/weights_equal"] == 1.0 and line["actor/grad_norm"] > 0


def test_every_family_is_here() -> None:
    assert tuple(sorted(OWN)) == families()


@pytest.mark.parametrize("family", OWN)
def test_every_step_starts_at_exactly_zero_kl(family: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(compose([*overrides(family, tmp_path), f"run_dir={run}"]))
    assert_exact(run, STEPS)
    lines = steps_of(run)
    sharpness = {line["guard/sharpness"] for line in lines if "guard/sharpness" in line}  # a mean of bytes may stay by chance
    assert len(sharpness) == 2 and f"evaluation/{OWN[family].reward}" in lines[-1], "training changed what is sampled"
    moved = {key for line in lines for key in line if key.startswith("actor/updates_")}
    assert len(moved) == (2 if family.startswith("wan") else 0)
    assert (run / "images" / f"step_{STEPS:04d}.png").is_file()


@pytest.mark.parametrize("family", ["wan2_2", "qwen_image_layered"])
def test_a_reward_of_images_is_refused_before_another_kind_is_sampled(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward jpeg_compressibility scores image, this model makes (layers|video)"):
        train(compose([*overrides(family, tmp_path), f"run_dir={tmp_path / 'run'}", "reward=jpeg_compressibility"]))


def test_a_run_of_two_experts_and_pictures_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Full weights, their average, the KL term."""
    more = ["trainer.lora_rank=0", "trainer.ema_decay=0.9", "algorithm.kl_coef=0.1", "trainer.save_every=1", "threads=1"]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(compose(overrides("wan2_2_i2v", tmp_path, *more, f"run_dir={whole}")))
    saved = [f"checkpoints/step_{step:05d}" for step in (1, STEPS)]
    train(compose(overrides("wan2_2_i2v", tmp_path, *more, f"run_dir={rest}", f"trainer.resume={whole / saved[0]}")))
    assert of_the_run(rest)[-1] == of_the_run(whole)[-1]
    files = [path.relative_to(whole) for path in (whole / saved[1]).rglob("*.safetensors")]
    assert {"transformer", "transformer_2"} <= {file.parts[2] for file in files}
    assert all((whole / file).read_bytes() == (rest / file).read_bytes() for file in files)


def command(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "omni_rollout.cli", "train", *words], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def of_the_run(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in steps_of(run)]


@pytest.mark.slow
@pytest.mark.parametrize("family", OWN)
def test_ten_steps_by_one_process_and_by_verl(family: str, tmp_path: Path) -> None:
    pytest.importorskip("verl")
    for backend in ("embedded", "verl"):
        words = overrides(
            family, tmp_path, f"run_dir={tmp_path / backend}", f"backend={backend}", "threads=1", steps=MORE_STEPS
        )
        command(*words)
        assert_exact(tmp_path / backend, MORE_STEPS)
    assert of_the_run(tmp_path / "verl") == of_the_run(tmp_path / "embedded")
