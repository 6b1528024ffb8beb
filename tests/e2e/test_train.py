"""The whole road on a random model: real engine, real optimizer, a reward that needs no reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from omni_rollout.launch.compose import compose
from omni_rollout.nano.random_weights import build_random
from omni_rollout.train import train

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    build_random(folder, seed=1)
    return folder


def run(checkpoint: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cat\na blue dog on a table\n")
    train(
        compose(
            [
                f"model.path={checkpoint}",
                f"prompts={prompts}",
                f"run_dir={folder / 'run'}",
                "collate.prompt_width=24",
                "sampling.height=64",
                "sampling.width=64",
                "sampling.num_inference_steps=5",
                "sampling.true_cfg_scale=2.0",
                "reward=jpeg_compressibility",
                "rollout.group_size=4",
                "rollout.prompts_per_step=2",
                f"trainer.steps={STEPS}",
                "trainer.learning_rate=1e-3",
                "evaluation.images=2",
                "wandb.mode=disabled",
                *overrides,
            ]
        )
    )
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=bfloat16", "trainer.ema_decay=0.9"],
        ["model.dtype=bfloat16", "trainer.lora_rank=4", "trainer.updates_per_step=2"],
        ["trainer.engine=deepspeed", "trainer.old_log_probs=recompute", "algorithm.kl_coef=0.01"],
    ],
    ids=["bf16-ema", "bf16-lora-two-updates", "deepspeed-recompute-kl"],
)
def test_every_step_starts_at_exactly_zero_kl(checkpoint, tmp_path, overrides):
    lines = run(checkpoint, tmp_path, *overrides)
    steps = [line for line in lines if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == 0.0
        assert line["parity/bitwise_equal_fraction"] == 1.0
        assert line["actor/pg_clipfrac_mb0"] == 0.0
        assert line["parity/weights_equal"] == 1.0
        assert line["parity/seed_collisions"] == 0.0
        assert line["actor/grad_norm"] > 0
    rewards = [line[key] for line in lines if (key := "evaluation/jpeg_compressibility") in line]
    assert len(rewards) == 2 and rewards[0] != rewards[1], "training changed what is sampled"
    assert (tmp_path / "run" / "images").is_dir() and (tmp_path / "run" / "config.yaml").is_file()


def test_the_saved_policy_loads_in_diffusers_and_is_the_trained_one(checkpoint, tmp_path):
    run(checkpoint, tmp_path)
    saved = QwenImageTransformer2DModel.from_pretrained(tmp_path / "run" / "checkpoints" / f"step_{STEPS:05d}" / "transformer")
    start = QwenImageTransformer2DModel.from_pretrained(checkpoint / "transformer")
    assert not torch.equal(saved.proj_out.weight, start.proj_out.weight)


def test_two_runs_of_one_seed_are_the_same_run(checkpoint, tmp_path):
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        lines = run(checkpoint, folder)
        runs.append([{k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))} for line in lines])
    assert runs[0] == runs[1]
