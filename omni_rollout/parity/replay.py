"""Scores capsules from any run or machine again, and says for each whether its log-probs still hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from omni_rollout.config import DType, TrainConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import compute_device
from omni_rollout.models import family_module
from omni_rollout.parity.measure import Measure, measure
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import PACKAGES, package_version
from omni_rollout.trajectories.capsule import CapsuleError, load_capsule
from omni_rollout.trajectories.digest import combined_digest, tensor_digest
from omni_rollout.types import Trajectory

ATTENTION = "TORCH_SDPA"  # what the trainer's attention is


@dataclass(frozen=True, kw_only=True)
class Replayed:
    path: Path
    refused: str | None = None  # why it was not scored
    measure: Measure | None = None
    not_honoured: tuple[str, ...] = ()  # fields of its fingerprint that are otherwise here, in words

    @property
    def holds(self) -> bool:
        return self.measure is not None and self.measure.exact

    @property
    def status(self) -> str:
        if self.measure is None:
            return "refused"
        return "equal" if self.holds else "different"


@dataclass
class Scorer:
    """The trainer's policy in one dtype."""

    config: TrainConfig
    dtype: str
    parity: str

    @cached_property
    def policy(self) -> Any:
        model = self.config.model
        policy = family_module(model.family, "policy").load_policy(model.path, getattr(torch, self.dtype), self.parity)
        return policy.to(compute_device())

    @cached_property
    def weights(self) -> str:
        named = effective_weights(self.policy, getattr(torch, self.dtype))
        return combined_digest({name: tensor_digest(tensor) for name, tensor in named})

    def score(self, path: Path, trajectory: Trajectory) -> Replayed:
        reason = self._misfit(trajectory)
        if reason is not None:
            return Replayed(path=path, refused=reason)
        log_probs = recompute(
            self.policy,
            [trajectory],
            family=self.config.model.family,
            dtype=getattr(torch, self.dtype),
            micro_batch_size=self.config.trainer.micro_batch_size,
        )
        return Replayed(
            path=path,
            measure=measure([trajectory], log_probs, self.config.trainer.clip_range),
            not_honoured=tuple(self._not_honoured(trajectory)),
        )

    def _misfit(self, trajectory: Trajectory) -> str | None:
        """Why the trajectory cannot be one of this model's."""
        if not len(trajectory.log_probs):
            return "it has no stochastic step, so no log-prob to score"
        model = self.config.model
        if trajectory.spec.family != model.family:
            return f"it is of family {trajectory.spec.family}, the model of {model.family}: give its own model.family"
        reason = family_module(model.family, "policy").misfit(self.policy, trajectory)
        return None if reason is None else f"{reason}; model.path={model.path}: give its own"

    def _not_honoured(self, trajectory: Trajectory) -> list[str]:
        here: dict[str, Any] = {
            "dtype": self.dtype,
            "attention": ATTENTION,
            "parity": self.parity,
            "weights": self.weights,
            "prompt_width": trajectory.spec.prompt_width,
            "guided": trajectory.spec.guided,
        }
        there = trajectory.fingerprint
        found = [
            f"{name} ({_told(there.get(name))}, here {_told(here[name])})" for name in here if there.get(name) != here[name]
        ]
        versions = there.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        for name in PACKAGES:
            if versions.get(name) != package_version(name):
                found.append(f"versions.{name} ({_told(versions.get(name))}, here {package_version(name)})")
        return found


def replay_capsules(config: TrainConfig, paths: Iterable[Path]) -> list[Replayed]:
    """One result per path, in the order given. A capsule's own dtype and profile are used where they exist."""
    scorers: dict[tuple[str, str], Scorer] = {}
    results = []
    for path in paths:
        try:
            trajectory = load_capsule(path)
        except CapsuleError as error:
            results.append(Replayed(path=path, refused=str(error)))
            continue
        own = trajectory.fingerprint.get("dtype")
        dtype = own if isinstance(own, str) and own in {choice.value for choice in DType} else config.model.dtype.value
        parity = config.parity.value
        scorer = scorers.setdefault((dtype, parity), Scorer(config, dtype, parity))
        try:
            results.append(scorer.score(path, trajectory))
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # a record that contradicts itself
            results.append(Replayed(path=path, refused=f"it cannot be scored as it is: {error}"))
    return results


def _told(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
