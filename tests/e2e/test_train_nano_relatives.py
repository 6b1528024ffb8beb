"""The recipes of the nano relatives, two short steps of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_rollout.launch.compose import compose
from omni_rollout.train import train

FEW = ["trainer.steps=2", "rollout.prompts_per_step=2", "rollout.group_size=4", "evaluation.images=16", "wandb.mode=disabled"]


@pytest.mark.parametrize(
    ("experiment", "least"),
    [
        ("nano_edit", {"recolour": 0.1, "exact_match": 0.2, "color_share": 0.2}),
        pytest.param("nano_layered", {"matte": 0.1, "iou": 0.2}, marks=pytest.mark.slow),
        pytest.param("nano_wan", {"moved": 0.5, "exact_match": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_two_steps_of_the_recipe_start_at_exactly_zero_kl(experiment: str, least: dict[str, float], tmp_path: Path) -> None:
    train(compose([f"experiment={experiment}", *FEW, f"run_dir={tmp_path}"]))
    before, *steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name, value in least.items():  # the engine samples with what training and its evaluation sampled with: else 0
        assert value <= before[f"evaluation/{name}"], name
    assert before["evaluation/reward"] <= 0.9
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["parity/ppo_kl_mb0"] == 0.0 and line["parity/bitwise_equal_fraction"] == 1.0
        assert line["parity/weights_equal"] == 1.0
