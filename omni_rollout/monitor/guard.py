"""Looks at a rollout before the update learns from it, and stops what must not reach the optimizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from omni_rollout.config import OldLogProbs, OnMismatch, TrainConfig
from omni_rollout.data.collate import derive_seed
from omni_rollout.errors import UserError
from omni_rollout.models.base.passes import PassLimit
from omni_rollout.models.base.policy import batch_keys
from omni_rollout.monitor.metrics import parity_metrics
from omni_rollout.monitor.suggested import parity_command
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.recompute import Pair, micro_batches, score, stochastic_pairs
from omni_rollout.policy.shares import gathered
from omni_rollout.types import Trajectory


class StoppedError(UserError):
    """A step that the guard ended before its update; `metrics` are what it found."""

    def __init__(self, message: str, metrics: Mapping[str, float]) -> None:
        super().__init__(message, metrics)  # both in `args`: the error may travel from another process
        self.metrics = dict(metrics)

    def __str__(self) -> str:
        return str(self.args[0])


class MismatchError(StoppedError):
    """The rollout's log-probs are not the trainer's, and the run was told to stop at that."""


class NotFiniteError(StoppedError):
    """The rollout holds NaN or infinity."""


def check_finite(step: int, trajectories: Sequence[Trajectory]) -> None:
    """Of trajectories whose latents may be on other ranks; those have a look at them, and all know. Collective.

    Rewards are checked where they are made.

    Raises:
        NotFiniteError: latents or log-probs that are not finite; it names the first such trajectory.
    """
    found = {
        trajectory.request_id: name
        for trajectory in trajectories
        for name, tensor in (("log_probs", trajectory.log_probs), ("latents", trajectory.latents))
        if tensor.device.type != "meta" and not bool(tensor.isfinite().all())
    }
    broken = {request_id: name for one in gathered(found) for request_id, name in one.items()}
    if broken:
        first = min(broken)
        raise NotFiniteError(
            f"step {step}: {broken[first]} of {first} are not finite, and of {len(broken) - 1} more of {len(trajectories)} "
            "trajectories; expected numbers, so nothing was learned from this step. Go on from an earlier checkpoint with a "
            "smaller trainer.learning_rate",
            {"rollout/not_finite": float(len(broken))},
        )


@torch.no_grad()
def compare_sample(
    policy: nn.Module, trajectories: Sequence[Trajectory], config: TrainConfig, *, seed: int
) -> dict[str, float]:
    """`parity_metrics` of some of the rollout's log-probs, drawn over all trajectories and steps, before the update.

    Costs one forward pass of a micro-batch per kind of batch (`batch_keys`: sizes, widths, mask or none).
    """
    family, dtype = config.model.family, getattr(torch, config.model.dtype.value)
    rollout, own, steps = [], [], []
    for pairs in _sample(trajectories, config, seed):
        own.append(score(policy, trajectories, pairs, family, dtype).log_prob.cpu())
        rollout.append(torch.stack([trajectories[pair.row].log_probs[pair.index] for pair in pairs]))
        steps.append(torch.stack([trajectories[pair.row].step_indices[pair.index] for pair in pairs]))
    elements = trajectories[0].latents[0].numel()
    return parity_metrics(torch.cat(rollout), torch.cat(own), torch.cat(steps), elements, config.trainer.clip_range)


def _sample(trajectories: Sequence[Trajectory], config: TrainConfig, seed: int) -> Iterator[list[Pair]]:
    in_all = stochastic_pairs(trajectories)
    for kind in micro_batches(trajectories, batch_keys(trajectories), in_all, PassLimit(len(in_all))):
        most = PassLimit.of_trainer(config.trainer).holds(trajectories[kind[0].row].spec)
        yield random.Random(seed).sample(kind, min(most, len(kind)))


def inspected_rows(trajectories: Sequence[Trajectory], config: TrainConfig, step: int) -> set[int]:
    """Those that `inspect` scores, and so needs the latents of: none where it compares nothing."""
    if not _compares(trajectories, config):
        return set()
    return {pair.row for pairs in _sample(trajectories, config, _seed(config, step)) for pair in pairs}


def _compares(trajectories: Sequence[Trajectory], config: TrainConfig) -> bool:
    asked = config.monitor.on_mismatch is not OnMismatch.alert or config.rollout.ahead
    return bool(asked and any(len(trajectory.log_probs) for trajectory in trajectories))


def _seed(config: TrainConfig, step: int) -> int:
    return derive_seed(config.sampling.seed, step, "guard")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found before the update."""

    recompute: bool  # this step's old log-probs are to be the trainer's own: by config, or because of a mismatch
    parity: Mapping[str, float]  # with rollout.ahead=1, of a sample under the weights that sampled it: `compare_sample`'s


def inspect(learner: Learner, trajectories: Sequence[Trajectory], config: TrainConfig, step: int) -> Inspection:
    """Compares a sample where `monitor.on_mismatch` asks for it, and with `rollout.ahead=1`, whose first mini-batch is scored
    by another policy than the one that sampled it.

    Trajectories without log-probs, of a forward algorithm, have none to compare.

    Raises:
        MismatchError: the rollout's are not the trainer's, with monitor.on_mismatch=stop.
    """
    recompute, action = config.trainer.old_log_probs is OldLogProbs.recompute, config.monitor.on_mismatch
    if not any(len(trajectory.log_probs) for trajectory in trajectories):
        return Inspection(recompute=False, parity={})
    if not _compares(trajectories, config):
        return Inspection(recompute=recompute, parity={})
    with learner.as_sampled() as network:
        found = compare_sample(network, trajectories, config, seed=_seed(config, step))
    different = found["parity/bitwise_equal_fraction"] < 1
    if different and action is OnMismatch.stop:
        raise mismatch(step, found, config)
    recompute = recompute or (different and action is OnMismatch.recompute)
    return Inspection(recompute=recompute, parity=found if config.rollout.ahead else {})


def mismatch(step: int, found: Mapping[str, float], config: TrainConfig) -> MismatchError:
    """The error of a step whose `compare_sample` found log-probs of other bits."""
    return MismatchError(
        f"step {step}: {1 - found['parity/bitwise_equal_fraction']:.0%} of the rollout's log-probs that were compared are not "
        f"the trainer's, the largest gap is {found['rollout_corr/logprob_abs_diff_max']:.1e} "
        f"({found['parity/over_clip']:.2g} clip ranges); parity={config.parity.value} promises equal bits, and "
        "monitor.on_mismatch=stop ends the run before it learns from this step. "
        f"Find the cause with: {parity_command(config)}; or go on with monitor.on_mismatch=recompute",
        found,
    )
