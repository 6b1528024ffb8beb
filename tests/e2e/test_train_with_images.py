"""The whole road for families with input images: prompts that carry pictures, a random model, a simple reward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.nano.random_weights import build_random
from omni_rollout.train import train

STEPS = 2
OWN = {  # overrides, the reward, and how many pictures the two prompts have
    "qwen_image_layered": (["sampling.extra={layers: 2, resolution: 64}"], "recomposition", (1, 1)),
    "qwen_image_edit": (["sampling.extra={vae_area: 4096, vision_area: 4096}"], "jpeg_compressibility", (1, 1)),
    "qwen_image_edit_plus": (["sampling.extra={vae_area: 4096, vision_area: 4096}"], "jpeg_compressibility", (1, 3)),
}


def overrides(family: str, folder: Path) -> list[str]:
    own, reward, numbers = OWN[family]
    lines = []
    for prompt, number in zip(("a red cat", "a blue dog on a table"), numbers, strict=True):
        files = [f"{prompt.split()[1]}{place}.png" for place in range(number)]
        for place, file in enumerate(files):
            pixels = np.full((64, 96 - 16 * place, 3), 255, np.uint8)
            pixels[16:48, 16:48] = (40 * place, 200, len(prompt))
            Image.fromarray(pixels).save(folder / file)
        lines.append(json.dumps({"prompt": prompt, "images": files}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    build_random(folder / "model", family=family, seed=1)
    return [
        f"model.family={family}",
        f"model.path={folder / 'model'}",
        f"prompts={folder / 'prompts.jsonl'}",
        f"run_dir={folder / 'run'}",
        "model.dtype=bfloat16",
        "collate.prompt_width=48",
        "sampling.num_inference_steps=4",
        "sampling.true_cfg_scale=2.0",
        f"reward={reward}",
        "rollout.group_size=3",
        "rollout.prompts_per_step=2",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.lora_rank=4",
        "evaluation.images=2",
        "wandb.mode=offline",
        *own,
    ]


@pytest.mark.parametrize("family", OWN)
def test_every_step_starts_at_exactly_zero_kl(family: str, tmp_path: Path) -> None:
    train(compose(overrides(family, tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
        assert line["parity/weights_equal"] == 1.0 and line["actor/grad_norm"] > 0
    key = f"evaluation/{OWN[family][1]}"
    assert len({line[key] for line in lines if key in line}) == 2, "training changed what is sampled"
    assert (tmp_path / "run" / "images" / f"step_{STEPS:04d}.png").is_file()


def test_a_reward_of_images_is_refused_before_layers_are_sampled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward jpeg_compressibility scores image and video, this model makes layers"):
        train(compose([*overrides("qwen_image_layered", tmp_path), "reward=jpeg_compressibility"]))
