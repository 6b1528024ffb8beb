"""Keys of other projects are answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omni_rollout.cli import main
from omni_rollout.launch import aliases
from omni_rollout.launch.compose import _choices
from omni_rollout.launch.keys import kind_of

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
ASKED = {  # key typed -> key it must name; those that the first trial found answered wrongly or not at all, and their like
    "num_image_per_prompt": "rollout.group_size",
    "sample.num_image_per_prompt": "rollout.group_size",
    "train.beta": "algorithm.kl_coef",
    "config.train.beta": "algorithm.kl_coef",
    "beta": "algorithm.kl_coef",
    "trainer.lr": "trainer.learning_rate",
    "lr": "trainer.learning_rate",
    "actor_rollout_ref.actor.optim.lr": "trainer.learning_rate",
    "rollout.n": "rollout.group_size",
    "actor_rollout_ref.rollout.n": "rollout.group_size",
    "pretrained.model": "model.path",
    "trainer.logger": "wandb.mode",
    "sample.num_steps": "sampling.num_inference_steps",
    "sample.guidance_scale": "sampling.true_cfg_scale",
    "train.num_inner_epochs": "trainer.updates_per_step",
    "data.train_files": "prompts",
    "data.val_files": "evaluation.prompts",
    "data.train_batch_size": "rollout.prompts_per_step",
    "actor_rollout_ref.actor.clip_ratio": "trainer.clip_range",
    "actor_rollout_ref.actor.kl_loss_coef": "algorithm.kl_coef",
    "trainer.total_epochs": "trainer.steps",
    "trainer.default_local_dir": "run_dir",
    "train.kl_beta": "algorithm.kl_coef",
    "model.model_name_or_path": "model.path",
    "train.learning_rate": "trainer.learning_rate",  # the same last name is as good as an alias
    "sample.noise_level": "sampling.noise_level",
    "train.clip_range": "trainer.clip_range",
    "reward.custom_reward_function.path": "reward.source",  # its own name comes before the last one, which is model.path's
    "actor_rollout_ref.model.algorithm": "algorithm",
    "algorithm.adv_estimator": "algorithm",  # in a section that takes the keys of the chosen algorithm
    "algorithm.global_std": "algorithm.advantage_std",
    "algorithm.lr": "trainer.learning_rate",
    "reward.custom_reward_function.name": "reward.source",
    "reward.aggregation": "reward.normalise",
    "actor_rollout_ref.actor.diffusion_loss.loss_mode": "algorithm",
    "actor_rollout_ref.rollout.pipeline.max_sequence_length": "collate.prompt_width",
    "actor_rollout_ref.rollout.algo.noise_level": "sampling.noise_level",
    "actor_rollout_ref.rollout.agent.num_workers": "rollout.workers",
    "trainer.val_before_train": "evaluation.images",
    "train.gradient_step_per_epoch": "trainer.updates_per_step",
    "train.adv_clip_range": "algorithm.advantage_clip",
    "train.num_frames": "sampling.extra",
    "train.advantage_aggregation": "reward.normalise",
    "scheduler.num_sde_steps": "sampling.sde_window_size",
    "config.activation_checkpointing": "trainer.gradient_checkpointing",
    "epochs": "trainer.steps",
    "batch_size": "rollout.prompts_per_step",
    "num_generations": "rollout.group_size",
    "n_images": "rollout.group_size",
    "lora.r": "trainer.lora_rank",
    "guidance": "sampling.true_cfg_scale",
    "trainer.max_actor_ckpt_to_keep": "trainer.keep_checkpoints",
    "sample.batch_size": "rollout.max_num_seqs",
    "train.batch_size": "trainer.micro_batch_size",
    "reward_fn.pickscore": "reward.weights",
    "out": "run_dir",
    "trainer.stpes": "trainer.steps",  # and a slip of the hand is none
}


@pytest.mark.parametrize(("typed", "ours"), ASKED.items())
def test_what_others_call_it_is_answered_with_ours(typed: str, ours: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=nano_ocr", f"{typed}=1"]) == 2
    told = capsys.readouterr().err
    assert re.match(rf"error: {typed}: (flow_grpo has )?no such key; did you mean {re.escape(ours)}\?", told), told


def test_gradients_are_summed_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """Naming trainer.updates_per_step alone would change what is learned."""
    assert main(["train", "experiment=nano_ocr", "train.gradient_accumulation_steps=4"]) == 2
    told = capsys.readouterr().err
    assert "no such key; gradients of a mini-batch are summed over as many passes as trainer.micro_batch_size makes" in told


@pytest.mark.parametrize("theirs", aliases.ALIASES)
def test_every_alias_names_a_key_that_is_there_and_none_that_is_ours_already(theirs: str) -> None:
    ours, note = aliases.ALIASES[theirs]
    assert kind_of(theirs) is None, f"{theirs} is a key of ours: the alias is never read"
    assert (kind_of(ours) is not None or bool(_choices(ours))) if ours else note


def test_at_least_the_keys_that_were_tried_are_known() -> None:
    assert len(aliases.ALIASES) >= 43


def test_the_page_has_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith("\n".join(aliases.as_table()) + "\n"), (
        "print it again: python -m omni_rollout.launch.aliases"
    )
