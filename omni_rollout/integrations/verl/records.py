"""What travels between the Ray processes beside requests and trajectories, and how trajectories lie in TransferQueue."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import ray
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from tensordict import TensorDict

from omni_rollout.config import TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.integrations.verl import NAME
from omni_rollout.launch.compose import compose, typed
from omni_rollout.launch.validate import validate
from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec, Trajectory

# Of an actor: verl loads the trainer in every process of the job; most have no use for it. Ray pickles tensors, at 1 GB/s,
# unless told to share their memory; nothing writes into weights or trajectories that it received.
RUNTIME_ENV: dict[str, Any] = {"env_vars": {"VERL_USE_EXTERNAL_MODULES": "", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}}

# Keys of verl that would be ignored, or end a run in its midst.
NOT_OURS = {
    "algorithm.filter_groups.enable": "groups are not filtered here; leave it out",
    "trainer.v1.sampler.sync_refill_failed_groups": "a request is retried until it is sampled; leave it out",
    "trainer.v1.sampler.custom_sampler.path": "the replay buffer is ours; leave it out",
    "algorithm.use_kl_in_reward": 'give omni_rollout=["algorithm.kl_coef=..."], the exact KL as a term of the loss',
    "actor_rollout_ref.actor.use_kl_loss": 'give omni_rollout=["algorithm.kl_coef=..."]',
    "global_profiler.steps": "not built; leave it out",
    "distillation.enabled": "not built; leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One version of the policy, as the trainer published it: whoever has it not, fetches it."""

    version: int
    digest: str
    buckets: tuple[
        ray.ObjectRef, ...
    ]  # each a list of (name, tensor), held by the first rank; none where engines are colocated
    machine: Mapping[str, Any] | None = None  # of that rank, as its self-check found it; None: the profile is not exact
    drift: float = 0.0  # from where the run started, see `policy.drift`

    def fetch(self) -> list[tuple[str, torch.Tensor]]:
        return [named for bucket in ray.get(list(self.buckets)) for named in bucket]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the agent loop is asked for: all requests of a step, under one version of the policy."""

    requests: tuple[RolloutRequest, ...]
    weights: Weights
    step: int
    partition: str  # of TransferQueue: train or val


def run_config(section: Any) -> TrainConfig:
    """Our section of verl's configuration, typed: the whole of it, or a list of overrides as the command line takes them."""
    if isinstance(section, ListConfig | list):
        config = compose(list(section))
        validate(config)
        return config
    return typed(section)


def to_section(config: TrainConfig) -> DictConfig:
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return OmegaConf.create(cast(dict[str, Any], container))


def adopt(config: DictConfig) -> TrainConfig:
    """Sets verl's keys that follow from our section, in place, and returns the section.

    Raises:
        UserError: keys of verl that ask for what this trainer does not do.
    """
    asked = {key: OmegaConf.select(config, key) for key in NOT_OURS}
    if wrong := [f"{key}={value}: {NOT_OURS[key]}" for key, value in asked.items() if value]:
        raise UserError("\n".join(wrong))
    run = run_config(config[NAME])
    with open_dict(config):
        config[NAME] = to_section(run)
        config.trainer.total_epochs = 1
        config.trainer.total_training_steps = run.trainer.steps
        config.trainer.test_freq = (run.evaluation.every or run.trainer.steps or 1) if run.evaluation.images else -1
        config.trainer.save_freq = -1  # ours are written when the step is in metrics.jsonl
        config.trainer.nnodes, config.trainer.n_gpus_per_node = run.trainer.ranks, 1  # wherever there is room for one
        config.data.train_batch_size = run.rollout.prompts_per_step
        config.actor_rollout_ref.rollout.n = run.rollout.group_size
        config.actor_rollout_ref.model.path = run.model.path
        config.actor_rollout_ref.model.tokenizer_path = os.path.join(run.model.path, "tokenizer")
    return run


def to_fields(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory in types that TransferQueue carries as they are; it would turn a dataclass into a dictionary."""
    values = {field.name: getattr(trajectory, field.name) for field in fields(Trajectory)}
    values["prompt"] = trajectory.prompt.to_json()
    values["spec"] = trajectory.spec.to_json()
    values["fingerprint"] = dict(trajectory.fingerprint)
    return values


def from_fields(values: Mapping[str, Any]) -> Trajectory:
    given = dict(values)
    return Trajectory(
        **{
            **given,
            "prompt": Prompt.from_json(given["prompt"]),
            "spec": SamplingSpec.from_json(given["spec"]),
        }
    )


def column(data: TensorDict, name: str) -> list[Any]:
    """A column of objects, as TransferQueue hands it back."""
    values = data[name]
    return cast(list[Any], values.tolist() if hasattr(values, "tolist") else list(values))
