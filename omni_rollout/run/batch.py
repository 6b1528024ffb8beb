"""One step's rollout in this process: sampled, kept and scored as its images finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_rollout.rewards import Meanwhile, WeightedSum
from omni_rollout.rollout.choice import Engine
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import RolloutRequest, Trajectory


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step learns from; its rewards may still be computed."""

    requests: list[RolloutRequest]
    trajectories: list[Trajectory]  # in the order of their ids
    rewards: Meanwhile
    version: int  # of the policy that sampled it
    expected: Mapping[str, Any]  # what the fingerprints must say
    kept: int  # had been finished before the run was stopped
    not_kept: str | None  # why a finished one is not on disk


def roll_out(
    engine: Engine,
    requests: list[RolloutRequest],
    rewards: WeightedSum,
    journal: Journal,
    *,
    step: int,
    version: int,
    expected: Mapping[str, Any],
    timeout: float,
) -> Batch:
    """Samples what the journal does not have, by the policy that the engine holds, which is `version`."""
    scored = Meanwhile(rewards, requests)
    try:
        trajectories, left = journal.take(step, requests, expected, version)
        kept = len(trajectories)
        for trajectory in trajectories:
            scored.add(trajectory)
        for trajectory in engine.generate(left, timeout=timeout):
            journal.keep(step, trajectory)
            trajectories.append(trajectory)
            scored.add(trajectory)
    except BaseException:
        scored.close()
        raise
    return Batch(
        requests=requests,
        trajectories=sorted(trajectories, key=lambda trajectory: trajectory.request_id),
        rewards=scored,
        version=version,
        expected=expected,
        kept=kept,
        not_kept=journal.failure,
    )
