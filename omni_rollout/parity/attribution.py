"""What each broken rule costs: alone, and added to those before it, on trajectories sampled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models.base.causes import Cause, Setting
from omni_rollout.parity.causes import SHARED, causes
from omni_rollout.parity.findings import Finding
from omni_rollout.parity.measure import Measure, measure
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import RolloutRequest, Trajectory

MICRO_BATCH_SIZE = 3  # odd, and not what the engine ran: rules about the batch must matter
LORA_SIZE = 0.05  # deviation of the factors that stand for a trained adapter
LORA = next(cause for cause in SHARED if cause.name == "lora_application")


@dataclass(frozen=True, kw_only=True)
class CauseResult:
    model: str
    cause: Cause
    dtype: str
    alone: Measure | None = None  # None: not run
    cumulative: Measure | None = None
    not_run: str | None = None

    @property
    def size(self) -> float:
        """What causes are ranked by: unlike the KL estimate, it does not shrink when gaps of both signs meet."""
        return self.alone.mean_abs_diff if self.alone is not None and not math.isnan(self.alone.mean_abs_diff) else -1.0


class Attribution:
    """Measures the causes against one policy and one set of its trajectories."""

    def __init__(self, setting: Setting, model: str, dtype: str, clip_range: float, *, compiled: bool = False) -> None:
        self._setting, self._model, self._dtype = setting, model, dtype
        self._clip_range, self._compiled = clip_range, compiled

    def score(self, trajectories: Sequence[Trajectory], causes: Sequence[Cause] = ()) -> Measure:
        setting = self._setting
        changed = list(trajectories)
        with ExitStack() as stack:
            for cause in causes:
                stack.enter_context(cause.broken(setting))
                changed = [cause.record(trajectory) for trajectory in changed]
            log_probs = recompute(
                setting.policy, changed, family=setting.family, dtype=setting.dtype, micro_batch_size=MICRO_BATCH_SIZE
            )
        return measure(trajectories, log_probs, self._clip_range)

    def causes(
        self, trajectories: Sequence[Trajectory], track: Callable[[Iterable[Cause]], Iterable[Cause]] = iter
    ) -> list[CauseResult]:
        """All but the application of LoRA. `track` sees each as it is taken."""
        results, added = [], []
        for cause in track(causes(self._setting.family)):
            if cause is LORA:
                continue
            if cause.slow and not self._compiled:
                reason = "it compiles for minutes; ask for it with compile=true"
                results.append(CauseResult(model=self._model, cause=cause, dtype=self._dtype, not_run=reason))
                continue
            if not cause.slow:
                added.append(cause)
            results.append(
                CauseResult(
                    model=self._model,
                    cause=cause,
                    dtype=self._dtype,
                    alone=self.score(trajectories, [cause]),
                    cumulative=None if cause.slow else self.score(trajectories, added),
                )
            )
        return results

    def cause(self, name: str, trajectories: Sequence[Trajectory]) -> CauseResult:
        """One of them, by itself."""
        cause = next(cause for cause in causes(self._setting.family) if cause.name == name)
        return CauseResult(model=self._model, cause=cause, dtype=self._dtype, alone=self.score(trajectories, [cause]))

    def lora(self, engine: RolloutEngine, requests: Sequence[RolloutRequest], rank: int) -> CauseResult:
        """Gives both sides an adapter, so it comes last: engine and policy are other ones afterwards."""
        factors = attach_lora(self._setting.policy, rank=rank)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for factor in factors:
                factor.add_(LORA_SIZE * torch.randn(factor.shape, generator=generator).to(factor.device))
        engine.update_weights(effective_weights(self._setting.policy, self._setting.dtype), engine.policy_version + 1)
        trajectories = list(engine.generate(requests))
        before = self.score(trajectories)
        if not before.exact:
            reason = f"with an adapter the two sides differ from the start, by up to {before.max_abs_diff:.3g}"
            return CauseResult(model=self._model, cause=LORA, dtype=self._dtype, not_run=reason)
        everything = [cause for cause in causes(self._setting.family) if not cause.slow]
        return CauseResult(
            model=self._model,
            cause=LORA,
            dtype=self._dtype,
            alone=self.score(trajectories, [LORA]),
            cumulative=self.score(trajectories, everything),
        )


def culprits(baseline: Measure, results: Sequence[CauseResult]) -> list[Finding]:
    """Causes that, broken on the trainer's side as well, bring the two sides together: the rollout breaks that rule."""
    if baseline.exact:
        return []
    return [
        Finding("cause", result.cause.name, f"with this broken in the trainer as well, the bits agree: {result.cause.breaks}")
        for result in results
        if result.alone is not None and result.alone.exact
    ]
