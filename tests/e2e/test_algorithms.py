"""Every algorithm on the whole road: real engine, real optimizer, two mini-batches a step; a forward one samples by the ode."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omni_rollout.algorithms import get_algorithm, names
from omni_rollout.algorithms.base import Coupled
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.monitor.pairs import NOT_APPLICABLE, PPO_KL_COMPARES
from omni_rollout.train import train

OWN = {  # what must be said for 5 steps, and what makes a case worth more
    "flow_grpo": ["algorithm.kl_coef=0.1", "algorithm.kl_with_dt=false"],
    "flow_grpo_fast": ["sampling.sde_window_range=[0,4]"],
    "mix_grpo": ["sampling.sde_window_size=2", "algorithm.window_every=1"],
    "dance_grpo": ["trainer.old_log_probs=recompute", "algorithm.rollout_is=sequence", "algorithm.rollout_rs=token_k1"],
    "diffusion_nft": ["algorithm.old_decay_type=2", "trainer.ema_decay=0.9"],
    "awm": ["trainer.lora_rank=2"],
}


QUICK = ("dance_grpo", "grpo_guard", "diffusion_nft", "diffusion_dpo")  # what the others need is among what these need


def run(model: Path, folder: Path, *more: str) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a red cat\na blue dog on a table\n")
    config = compose(
        [
            f"model.path={model}",
            f"prompts={folder / 'prompts.txt'}",
            f"run_dir={folder / 'run'}",
            "collate.prompt_width=24",
            "sampling.height=64",
            "sampling.width=64",
            "sampling.num_inference_steps=5",
            "sampling.true_cfg_scale=1.0",
            "reward=jpeg_compressibility",
            "rollout.group_size=4",
            "rollout.prompts_per_step=2",
            "trainer.steps=2",
            "trainer.updates_per_step=2",
            "trainer.learning_rate=1e-3",
            "wandb.mode=disabled",
            "threads=1",
            *more,
        ]
    )
    validate(config)
    train(config)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names()])
def test_two_steps(random_checkpoint: Path, tmp_path: Path, name: str) -> None:
    lines = run(random_checkpoint, tmp_path, f"algorithm={name}", *OWN.get(name, []))
    coupled = isinstance(get_algorithm(compose(["model=nano", "prompts=p.txt", f"algorithm={name}"]).algorithm), Coupled)
    for line in lines:
        assert line["actor/grad_norm"] > 0 and line["parity/weights_equal"] == 1.0 and "alerts/names" not in line
        if coupled:
            assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
            assert line["actor/pg_clipfrac_mb0"] == 0.0
        else:
            assert not [key for key in line if key.startswith(("parity/ppo", "parity/kl", "rollout_corr/", "actor/ratio"))]
            assert line[PPO_KL_COMPARES] == NOT_APPLICABLE
        assert all(value is None or isinstance(value, str) or math.isfinite(value) for value in line.values())


@pytest.mark.slow
def test_an_old_policy_goes_on_to_the_last_bit(random_checkpoint: Path, tmp_path: Path) -> None:
    """Four steps in one go, and stopped after two: metrics, weights, old policy and average are the same."""
    more = [
        "algorithm=diffusion_nft",
        "algorithm.kl_coef=0",
        "trainer.ema_decay=0.9",
        "trainer.save_every=2",
        "evaluation.images=2",
    ]
    steps = ["trainer.steps=4", "trainer.schedule=constant"]
    whole = run(random_checkpoint, tmp_path / "whole", *more, *steps)
    run(random_checkpoint, tmp_path / "cut", *more, "trainer.steps=2", "trainer.schedule=constant")
    resumed = run(random_checkpoint, tmp_path / "cut", *more, *steps, "trainer.resume=auto")
    keys = [key for key in whole[-1] if not key.startswith(("timing_s/", "perf/"))]
    assert whole[-1]["step"] == resumed[-1]["step"] == 4
    assert [whole[-1][key] for key in keys] == [resumed[-1][key] for key in keys]
    one, other = (tmp_path / name / "run" / "checkpoints" / "step_00004" for name in ("whole", "cut"))
    for part in ("transformer", "old/transformer", "ema/transformer"):
        tensors, again = (weights(folder / part) for folder in (one, other))
        assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors), part
    assert not same(weights(one / "transformer"), weights(one / "old/transformer"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
