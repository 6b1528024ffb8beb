"""Scores capsules from any run or machine again, and says for each whether its log-probs still hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from omni_rollout.config import DType, TrainConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import differences, machine
from omni_rollout.diffusion.self_check import checker
from omni_rollout.models import family_module
from omni_rollout.parity.causes import Setting, calls_as_they_come, math_attention
from omni_rollout.parity.measure import Measure, measure
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.records import package_versions
from omni_rollout.run.restore import restored_policy
from omni_rollout.run.source import Source
from omni_rollout.trajectories.capsule import CapsuleError, load_capsule
from omni_rollout.trajectories.digest import combined_digest, tensor_digest
from omni_rollout.types import Trajectory

ATTENTION = "TORCH_SDPA"  # what the trainer's attention is
MARGIN = 16  # rounding explains a gap of as many times what this machine's own other kernels make of the same capsule


@dataclass(frozen=True, kw_only=True)
class Replayed:
    path: Path
    refused: str | None = None  # why it was not scored
    measure: Measure | None = None
    not_honoured: tuple[str, ...] = ()  # fields of its fingerprint that are otherwise here, in words
    other_machine: tuple[str, ...] = ()  # where the bits differ: the same of its machine; empty: the machine is no excuse
    other_version: int | None = None  # of the policy that sampled it, where its weights are not those here
    explained: float = 0.0  # the largest gap that rounding explains here, where the machine is another

    @property
    def holds(self) -> bool:
        return self.measure is not None and self.measure.exact

    @property
    def status(self) -> str:
        """`refused`, `equal`, `different`, or of another machine `within` or `outside` what rounding explains."""
        if self.measure is None:
            return "refused"
        if self.holds or not self.other_machine:
            return "equal" if self.holds else "different"
        return "within" if self.measure.max_abs_diff <= self.explained else "outside"


@dataclass
class Scorer:
    """The trainer's policy in one dtype."""

    config: TrainConfig
    dtype: str
    source: Source | None = None  # a checkpoint of that policy

    @property
    def parity(self) -> str:
        return self.config.parity.value

    @cached_property
    def policy(self) -> Any:
        return restored_policy(self.config, self.source, self.dtype)

    @cached_property
    def weights(self) -> str:
        named = effective_weights(self.policy, getattr(torch, self.dtype))
        return combined_digest({name: tensor_digest(tensor) for name, tensor in named})

    @cached_property
    def machine(self) -> dict[str, Any]:
        """As a fingerprint has it: with the self-check's results, unless the profile has none."""
        device = next(self.policy.parameters()).device
        return machine(device) if self.parity == "fast" else checker(self.policy, getattr(torch, self.dtype), device)()

    def score(self, path: Path, trajectory: Trajectory) -> Replayed:
        reason = self._misfit(trajectory)
        if reason is not None:
            return Replayed(path=path, refused=reason)
        here = self.machine  # before anything is multiplied: the self-check decides how
        log_probs = self._log_probs(trajectory)
        found = Replayed(
            path=path,
            measure=measure([trajectory], [log_probs], self.config.trainer.clip_range),
            not_honoured=tuple(self._not_honoured(trajectory)),
            other_version=None if trajectory.fingerprint.get("weights") == self.weights else trajectory.policy_version,
        )
        if found.holds or any(not field.startswith("versions.") for field in found.not_honoured):
            return found  # other weights, another dtype: the gap is not the machine's
        other = other_machine(trajectory.fingerprint.get("machine"), here)
        return replace(found, other_machine=tuple(other), explained=self._explained(trajectory, log_probs)) if other else found

    def _log_probs(self, trajectory: Trajectory) -> torch.Tensor:
        (log_probs,) = recompute(
            self.policy,
            [trajectory],
            family=self.config.model.family,
            dtype=getattr(torch, self.dtype),
            micro_batch_size=self.config.trainer.micro_batch_size,
        )
        return log_probs

    def _explained(self, trajectory: Trajectory, log_probs: torch.Tensor) -> float:
        """MARGIN times what this machine's own other kernels change in this trajectory, and at least one spacing of fp32."""
        setting = Setting(self.policy, self.config.model.family, getattr(torch, self.dtype))
        with math_attention(setting), calls_as_they_come(setting):
            gap = (self._log_probs(trajectory).double() - log_probs.double()).abs().max().item()
        return MARGIN * max(gap, torch.finfo(torch.float32).eps * log_probs.abs().max().item())

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
        for name, own in package_versions().items():
            if versions.get(name) != own:
                found.append(f"versions.{name} ({_told(versions.get(name))}, here {own})")
        return found


def other_machine(there: Any, here: Mapping[str, Any]) -> list[str]:
    """What of the machine that a capsule was made on is not as it is here, in words."""
    if not isinstance(there, Mapping) or not there:
        return ["which one, the capsule does not say"]
    return differences(there, here if "kernels" in there else {name: value for name, value in here.items() if name in there})


def replay_capsules(config: TrainConfig, paths: Iterable[Path], source: Source | None = None) -> list[Replayed]:
    """One result per path, in the order given. A capsule's own dtype is used where it exists.

    Args:
        source: a checkpoint to score with; None: the model at `config.model.path` as it is.
    """
    scorers: dict[str, Scorer] = {}
    results = []
    for path in paths:
        try:
            trajectory = load_capsule(path)
        except CapsuleError as error:
            results.append(Replayed(path=path, refused=str(error)))
            continue
        own = trajectory.fingerprint.get("dtype")
        dtype = own if isinstance(own, str) and own in {choice.value for choice in DType} else config.model.dtype.value
        scorer = scorers.setdefault(dtype, Scorer(config, dtype, source))
        try:
            results.append(scorer.score(path, trajectory))
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # a record that contradicts itself
            results.append(Replayed(path=path, refused=f"it cannot be scored as it is: {error}"))
    return results


def _told(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
