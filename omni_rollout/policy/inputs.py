"""What a loss is given for one micro-batch: forward passes of the policy, and of those it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omni_rollout.algorithms.base import Algorithm, Coupled, Loss, Samples, Steps
from omni_rollout.data.collate import derive_seed
from omni_rollout.diffusion.sde import gaussian_kl, per_sample
from omni_rollout.models.base.policy import steps_to_learn
from omni_rollout.policy.recompute import Pair, Scored, device_of, predict, score
from omni_rollout.policy.trainer_engines import TrainerEngine
from omni_rollout.types import Trajectory

Shown = Callable[[], AbstractContextManager[nn.Module]]  # inside, the network of another policy


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one update learns from."""

    trajectories: Sequence[Trajectory]  # B
    advantages: torch.Tensor  # [B]
    old_log_probs: Sequence[torch.Tensor]  # B of [T] fp32
    seed: int  # of the step: times and noise of forward algorithms follow from it and the request
    weights: Sequence[torch.Tensor] | None = None  # B of [T] fp32, of rollout correction
    recalled: dict[Pair, torch.Tensor] = field(default_factory=dict)  # [*shape], predicted before the first optimizer step


@dataclass(frozen=True, kw_only=True)
class Given:
    """One micro-batch's inputs, and what the step's metrics are made of."""

    inputs: Steps | Samples
    log_probs: torch.Tensor | None  # [B], of a coupled algorithm
    old_log_probs: torch.Tensor | None  # [B]
    ref_kl: torch.Tensor | None  # [B]


class Inputs:
    """Binds policies and algorithm.

    Args:
        reference: inside, gives the policy the run started from; None: the algorithm needs none.
        old: the same for the old policy.
    """

    def __init__(
        self,
        engine: TrainerEngine,
        algorithm: Algorithm,
        clip_range: float,
        *,
        family: str,
        dtype: torch.dtype,
        reference: Shown | None,
        old: Shown | None,
    ) -> None:
        self._engine, self._algorithm, self._clip_range = engine, algorithm, clip_range
        self._family, self._dtype = family, dtype
        self._reference, self._old = reference, old

    def __call__(self, rows: Rows, pairs: Sequence[Pair]) -> Given:
        if isinstance(self._algorithm, Coupled):
            return self._steps(rows, pairs)
        return Given(inputs=self._samples(rows, pairs), log_probs=None, old_log_probs=None, ref_kl=None)

    def loss(self, given: Given) -> Loss:
        algorithm: Any = self._algorithm  # each kind has its own inputs
        return algorithm.loss(given.inputs)

    def score(self, rows: Rows, pairs: Sequence[Pair], network: nn.Module | None = None) -> Scored:
        network = self._engine.module if network is None else network
        return score(network, rows.trajectories, pairs, self._family, self._dtype)

    @torch.no_grad()
    def recall(self, rows: Rows, pairs: Sequence[Pair]) -> None:
        """Keeps what the policy predicts now: means of steps, or velocities."""
        if isinstance(self._algorithm, Coupled):
            now = self.score(rows, pairs).mean
        else:
            now = self._predict(self._engine.module, rows, pairs, self._noised(rows, pairs)[0])
        rows.recalled.update(zip(pairs, now.cpu(), strict=True))

    def _steps(self, rows: Rows, pairs: Sequence[Pair]) -> Given:
        reference = None
        if self._reference is not None:
            with torch.no_grad(), self._reference() as network:
                reference = self.score(rows, pairs, network)
        step = self.score(rows, pairs)
        device = step.log_prob.device
        old = torch.stack([rows.old_log_probs[pair.row][pair.index] for pair in pairs]).to(device)
        ref_kl = None if reference is None else gaussian_kl(step.mean, reference.mean, step.step_std)
        inputs = Steps(
            old_log_probs=old,
            advantages=self._advantages(rows, pairs, device),
            clip_range=self._clip_range,
            log_probs=step.log_prob,
            mean=step.mean,
            velocity=step.velocity,
            sample=step.sample,
            prev_sample=step.prev_sample,
            step_std=step.step_std,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            old_mean=self._recalled(rows, pairs, step.mean),
            kl=ref_kl,
        )
        return Given(inputs=inputs, log_probs=step.log_prob, old_log_probs=old, ref_kl=ref_kl)

    def _samples(self, rows: Rows, pairs: Sequence[Pair]) -> Samples:
        sample, x0, noise, sigma = self._noised(rows, pairs)
        others: dict[str, torch.Tensor] = {}
        for name, shown in (("old_velocity", self._old), ("reference_velocity", self._reference)):
            if shown is not None:
                with (
                    torch.no_grad(),
                    shown() as network,
                ):  # before the policy's own pass: an old one takes its place for a while
                    others[name] = self._predict(network, rows, pairs, sample)
        velocity = self._predict(self._engine.module, rows, pairs, sample)
        return Samples(
            advantages=self._advantages(rows, pairs, velocity.device),
            clip_range=self._clip_range,
            x0=x0,
            noise=noise,
            sigma=sigma,
            sample=sample,
            velocity=velocity,
            first_velocity=self._recalled(rows, pairs, velocity),
            **others,
        )

    def _predict(self, network: nn.Module, rows: Rows, pairs: Sequence[Pair], sample: torch.Tensor) -> torch.Tensor:
        return predict(network, rows.trajectories, pairs, sample, self._family, self._dtype)

    def _noised(self, rows: Rows, pairs: Sequence[Pair]) -> tuple[torch.Tensor, ...]:
        """(sample, x0, noise, sigma) of the pairs' times."""
        device = device_of(self._engine.module)
        chosen = [rows.trajectories[pair.row] for pair in pairs]
        steps = [steps_to_learn(one)[pair.index] for one, pair in zip(chosen, pairs, strict=True)]
        x0 = torch.stack([one.latents[-1] for one in chosen])
        sigma = torch.stack([one.sigmas[step] for one, step in zip(chosen, steps, strict=True)])
        noise = torch.stack([self._noise(rows, one, step) for one, step in zip(chosen, steps, strict=True)])
        share = per_sample(sigma, x0)
        sample = (1 - share) * x0 + share * noise
        return sample.to(device), x0.to(device), noise.to(device), sigma.to(device)

    def _noise(self, rows: Rows, trajectory: Trajectory, step: int) -> torch.Tensor:
        seed = derive_seed(rows.seed, "noise", self.draws_by(trajectory), step)
        return torch.randn(trajectory.latents[-1].shape, generator=torch.Generator().manual_seed(seed))

    def draws_by(self, trajectory: Trajectory) -> str:
        """Trajectories of one name get the same times and the same noise."""
        return trajectory.group_id if self._algorithm.shares_noise else trajectory.request_id

    def _advantages(self, rows: Rows, pairs: Sequence[Pair], device: torch.device) -> torch.Tensor:
        advantage = torch.stack([rows.advantages[pair.row] for pair in pairs])
        if rows.weights is not None:  # never negative, so the loss is weighed as its advantage is
            advantage = advantage * torch.stack([rows.weights[pair.row][pair.index] for pair in pairs])
        return advantage.to(device)

    def _recalled(self, rows: Rows, pairs: Sequence[Pair], now: torch.Tensor) -> torch.Tensor | None:
        """What the policy predicted before the first optimizer step; until then, what it predicts now."""
        if not self._algorithm.recalls:
            return None
        if not rows.recalled:
            return now.detach()
        return torch.stack([rows.recalled[pair] for pair in pairs]).to(now.device)
