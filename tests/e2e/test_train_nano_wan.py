"""The recipe of digits that move, two short steps of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_rollout.launch.compose import compose
from omni_rollout.train import train


@pytest.mark.slow
def test_two_steps_of_the_recipe_start_at_exactly_zero_kl(tmp_path: Path) -> None:
    few = [
        "trainer.steps=2",
        "rollout.prompts_per_step=2",
        "rollout.group_size=4",
        "evaluation.images=16",
        "wandb.mode=disabled",
    ]
    train(compose(["experiment=nano_wan", *few, f"run_dir={tmp_path}"]))
    before, *steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The engine samples with what training and its evaluation sampled with: else this would be 0.
    assert before["evaluation/moved"] >= 0.5 and before["evaluation/exact_match"] >= 0.1
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
        assert line["parity/weights_equal"] == 1.0
