"""A checkpoint's weights, in a policy of their own or in an engine."""

from __future__ import annotations

from typing import Any

import torch

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import compute_device
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.policy.checkpoint import load_weights
from omni_rollout.policy.state import OLD, verify
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.run.source import Source
from omni_rollout.trajectories.digest import combined_digest, tensor_digests


def restored_policy(config: TrainConfig, source: Source | None, dtype: str | None = None) -> Any:
    """The trainer's policy at `config.model.path`, with the weights of `source`, where there is one.

    Args:
        dtype: to compute in; None: the config's.

    Raises:
        UserError: a file that is not what was saved, or weights that do not fit the model.
    """
    model = config.model
    load = family_module(model.family, "policy").load_policy
    policy = load(model.path, getattr(torch, dtype or model.dtype.value), config.parity.value)
    if source is not None:
        verify(source.folder)
        load_weights(source.weights_folder, policy)
    return policy.to(compute_device())


def put_into(engine: RolloutEngine, config: TrainConfig, source: Source) -> None:
    """The engine samples with the checkpoint's weights from now on: those that the run trained, and evaluated after that step.

    Raises:
        UserError: as above, or the model at model.path is another than the run was started from.
        WeightSyncError: the engine does not hold what it was given.
    """
    policy = restored_policy(config, source, engine.dtype)
    digest = engine.update_weights(effective_weights(policy, getattr(torch, engine.dtype)), source.run.step)
    same_dtype = engine.dtype == source.run.config.get("model.dtype")  # else other bits were saved, and rightly
    known = not same_dtype or source.averaged or digest == source.run.weights
    if not known and not _sampled_by_old(policy, engine, source):
        raise UserError(
            f"{source.folder} gives weights {digest[:16]}, but {source.run.weights[:16]} were saved: the model at "
            f"model.path={config.model.path} is another than the run was started from; give that one"
        )


def _sampled_by_old(policy: Any, engine: RolloutEngine, source: Source) -> bool:
    """Whether the weights that the run wrote down are those of its old policy, which sampled in its place."""
    if not (source.folder / OLD).is_dir():
        return False
    load_weights(source.folder / OLD, policy)
    held = tensor_digests(effective_weights(policy, getattr(torch, engine.dtype)))
    return combined_digest(held) == source.run.weights
