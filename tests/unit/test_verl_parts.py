"""What the verl back end does without Ray: buckets, records, its configuration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("verl")

from omni_rollout.algorithms.awm import AWM
from omni_rollout.config import RewardConfig, TrainConfig
from omni_rollout.errors import PinnedKnobError, UserError
from omni_rollout.integrations.verl import agent_loop
from omni_rollout.integrations.verl.launch import check_platform, verl_config
from omni_rollout.integrations.verl.metrics import merged
from omni_rollout.integrations.verl.records import (
    NOT_OURS,
    Weights,
    adopt,
    from_fields,
    run_config,
    to_fields,
    to_section,
)
from omni_rollout.integrations.verl.server import RolloutServer
from omni_rollout.launch.compose import compose
from omni_rollout.policy.update import Scores, Update
from omni_rollout.rollout.dispatch import Dispatcher
from omni_rollout.trajectories.digest import buckets
from omni_rollout.types import Prompt, SamplingSpec, Trajectory

SPEC = SamplingSpec(
    height=64,
    width=64,
    num_inference_steps=4,
    true_cfg_scale=1.0,
    negative_prompt=None,
    noise_level=0.7,
    sde_type="sde",
    log_prob_form="gaussian",
    step_indices=(0, 1),
    prompt_width=16,
    negative_prompt_width=16,
)


def test_the_agent_loop_is_driven_by_the_dispatcher_that_is_simulated():
    assert agent_loop.Dispatcher is Dispatcher


def test_buckets_keep_order_and_limit():
    named = [(str(index), torch.zeros(size)) for index, size in enumerate([10, 10, 10, 100, 1, 1])]
    cut = list(buckets(named, limit=80))
    assert [[name for name, _ in bucket] for bucket in cut] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert all(a is b for (_, a), (_, b) in zip(named, [pair for bucket in cut for pair in bucket], strict=True))


def test_a_trajectory_comes_back_from_its_fields_as_it_was():
    trajectory = Trajectory(
        latents=torch.randn(3, 16, 64),
        log_probs=torch.randn(2),
        step_indices=torch.tensor([0, 1]),
        sigmas=torch.linspace(1, 0, 5),
        timesteps=torch.linspace(1000, 1, 4),
        prompt_embeds=torch.randn(16, 8).bfloat16(),
        prompt_embeds_mask=torch.ones(16, dtype=torch.bool),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        media=np.zeros((64, 64, 3), np.uint8),
        prompt=Prompt(text="a cat", metadata={"text": "7"}),
        spec=SPEC,
        seed=3,
        group_id="g",
        member=0,
        policy_version=1,
        fingerprint={"weights": "abc", "batch_sizes": [2]},
    )
    stored = to_fields(trajectory)
    stored["spec"]["step_indices"] = list(stored["spec"]["step_indices"])  # TransferQueue knows no tuples
    back = from_fields(stored)
    for field in fields(Trajectory):
        one, other = getattr(trajectory, field.name), getattr(back, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other), field.name


def test_a_configuration_comes_back_from_verls_as_it_was():
    config = TrainConfig(reward=RewardConfig(weights={"jpeg_compressibility": 2.0}), algorithm=AWM(name="awm", times=3))
    config.model.path = "m"
    config.prompts = "p.txt"
    config.run_dir = "r"
    assert run_config(to_section(config)) == config
    assert run_config(OmegaConf.to_container(to_section(config))) == config  # as it goes to a process of Ray


def test_verls_configuration_takes_ours_and_registers_our_trainer(random_checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    composed = verl_config(
        compose([f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "backend=verl", "launch.cpus=7"])
    )
    assert composed.trainer.v1.trainer_mode == "omni_rollout"
    assert composed.ray_kwargs.ray_init.num_cpus == 7
    assert run_config(composed.omni_rollout).reward.weights == {"ocr": 1.0}
    cluster = verl_config(
        compose([f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "backend=verl", "launch=ray"])
    )
    assert cluster.ray_kwargs.ray_init.address == "auto" and "num_cpus" not in cluster.ray_kwargs.ray_init


def test_keys_of_verl_that_ask_for_what_is_not_done_are_refused_by_name(random_checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    config = verl_config(compose([f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}"]))
    adopt(config)
    for key in NOT_OURS:
        OmegaConf.update(config, key, True, force_add=True)
    with pytest.raises(UserError) as refused:
        adopt(config)
    assert [line.partition("=")[0] for line in str(refused.value).splitlines()] == list(NOT_OURS)


def test_verl_loads_the_cpu_platform_by_itself():
    check_platform()
    code = "import verl; from verl.utils.device import get_device_name; print(get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "cpu" if not torch.accelerator.is_available() else "cuda"
    assert done.stdout.strip().endswith(expected), done.stderr


def test_merged_shares_are_all_rows():
    def update(*rows: float) -> Update:
        scores = Scores(
            step_indices=[0] * len(rows),
            rollout_log_probs=[torch.tensor(rows)],
            old_log_probs=[torch.tensor(rows)],
            log_probs=[torch.tensor(rows)],
        )
        metrics = {"actor/dropped": list(rows)}
        return Update(
            coupled=True,
            first=scores,
            all=scores,
            losses=list(rows),
            grad_norms=[2.0],
            metrics=metrics,
            moved={"transformer": 1},
        )

    both = merged([update(1.0, 2.0), update(3.0)])
    assert torch.cat(both.all.log_probs).tolist() == [1.0, 2.0, 3.0]
    assert both.losses == [1.0, 2.0, 3.0] and both.grad_norms == [2.0]
    assert both.metrics == {"actor/dropped": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize("field", ["threads", "calls", "kernels"])
def test_a_server_refuses_weights_of_a_trainer_on_another_machine(field):
    here = {"device": "CPU", "threads": 2, "calls": "blocks", "torch": "2", "switches": "", "kernels": "a"}
    server = object.__new__(RolloutServer)
    server.engine = SimpleNamespace(machine={**here, field: "other"}, weights_digest="d", policy_version=1)
    with pytest.raises(PinnedKnobError, match=f"the engine and the trainer would not compute the same bits: {field}"):
        server.load(Weights(version=1, digest="d", buckets=(), machine=here))
    server.engine.machine = here
    assert server.load(Weights(version=1, digest="d", buckets=(), machine=here)) == "d"
