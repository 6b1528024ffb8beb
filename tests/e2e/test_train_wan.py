"""The whole road for videos: two experts, prompts with and without a first frame, a random model, a simple reward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from omni_rollout.launch.compose import compose
from omni_rollout.nano.random_weights import build_random
from omni_rollout.train import train

STEPS = 2


def overrides(family: str, folder: Path, *own: str) -> list[str]:
    lines = [{"prompt": "a red cat moving left"}, {"prompt": "a blue dog on a table"}]
    if family == "wan2_2_i2v":
        for number, line in enumerate(lines):
            Image.fromarray(np.full((32, 48, 3), 90 * number + 40, np.uint8)).save(folder / f"{number}.png")
            line["images"] = f"{number}.png"
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_random(folder / "model", family=family, seed=1)
    return [
        f"model.family={family}",
        f"model.path={folder / 'model'}",
        f"prompts={folder / 'prompts.jsonl'}",
        f"run_dir={folder / 'run'}",
        "model.dtype=bfloat16",
        "collate.prompt_width=24",
        "sampling.height=32",
        "sampling.width=48",
        "sampling.num_inference_steps=5",
        "sampling.true_cfg_scale=2.0",
        "sampling.extra={frames: 5, flow_shift: 3.0, true_cfg_scale_2: 1.0}",
        "reward=jpeg_compressibility",
        "rollout.group_size=3",
        "rollout.prompts_per_step=2",
        "trainer.learning_rate=1e-3",
        f"trainer.steps={STEPS}",
        "evaluation.images=2",
        "wandb.mode=offline",
        *own,
    ]


def check(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
        assert line["parity/weights_equal"] == 1.0 and line["actor/grad_norm"] > 0
    assert (folder / "run" / "images" / f"step_{STEPS:04d}.png").is_file()
    return lines


@pytest.mark.parametrize(("family", "rank"), [("wan2_2", 4), ("wan2_2_i2v", 0)])
def test_every_step_starts_at_exactly_zero_kl(family: str, rank: int, tmp_path: Path) -> None:
    train(compose(overrides(family, tmp_path, f"trainer.lora_rank={rank}")))
    lines = check(tmp_path)
    key = "evaluation/jpeg_compressibility"
    assert len({line[key] for line in lines if key in line}) == 2, "training changed what is sampled"
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    for name, folder in (("transformer", "lora"), ("transformer_2", "lora_2")):
        before = WanTransformer3DModel.from_pretrained(tmp_path / "model", subfolder=name).state_dict()
        if rank:
            (file,) = (saved / folder).glob("*.safetensors")
            assert all(tensor.any() for tensor in load_file(file).values()), "both factors of every layer have moved"
        else:
            after = WanTransformer3DModel.from_pretrained(saved / name).state_dict()
            assert not any((after[key] == before[key]).all() for key in before), "every tensor of both experts has moved"


def test_an_expert_without_a_step_in_the_window_stays_where_it_is(tmp_path: Path) -> None:
    own = ("trainer.lora_rank=0", "trainer.weight_decay=0.1", "sampling.sde_window_range=[0,1]")
    train(compose(overrides("wan2_2", tmp_path, *own)))
    check(tmp_path)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    moved = []
    for name in ("transformer", "transformer_2"):
        before = WanTransformer3DModel.from_pretrained(tmp_path / "model", subfolder=name).state_dict()
        after = WanTransformer3DModel.from_pretrained(saved / name).state_dict()
        moved.append([key for key in before if not (after[key] == before[key]).all()])
    assert len(moved[0]) == len(before) and not moved[1]
