"""Whether a run is lost: its reward has fallen beyond the noise, in training or held out, or its weights are somewhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from omni_rollout.config import TrainConfig
from omni_rollout.monitor.alerts import Alert
from omni_rollout.monitor.suggested import train_command

FALL = 4.0  # standard errors; every step is compared with the best stretch so far, so 3 would be reached by chance
WINDOW, LATEST = 5, 3  # steps of the best stretch so far, and of the one that is compared with it
MEAN, STD = "critic/rewards/mean", "critic/rewards/std"
HELD_OUT, HELD_OUT_ERROR, DRIFT = "evaluation/reward", "evaluation/reward_se", "actor/drift"
FARTHEST = 1.0  # |w - w0| / |w0|: as far from the start as the start is from no weights at all


def run_lost(
    step: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]], config: TrainConfig
) -> Iterator[Alert]:
    """`reward_collapsed`, `held_out_collapsed`, `drifted_away`.

    Args:
        history: the lines of metrics before this step.
    """
    yield from reward_collapsed(step, metrics, history, config)
    yield from _held_out_collapsed(step, metrics, history, config)
    yield from _drifted_away(step, metrics, config)


def reward_collapsed(
    step: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]], config: TrainConfig
) -> Iterator[Alert]:
    """The alert `reward_collapsed`: the latest steps' mean reward is FALL standard errors below the best before.

    Each step has other prompts, so a step's mean has the standard error std / sqrt(prompts of the step).

    Args:
        history: the lines of metrics before this step.
    """
    steps = [line for line in [*history, metrics] if line.get(MEAN) is not None and line.get(STD) is not None]
    if len(steps) < 2 or MEAN not in metrics or not math.isfinite(metrics[MEAN]):
        return
    latest = steps[max(len(steps) - LATEST, 1) :]
    before = steps[: len(steps) - len(latest)]
    size = min(WINDOW, len(before))
    best = max((before[start : start + size] for start in range(len(before) - size + 1)), key=_mean)
    error = math.hypot(_error(best, config), _error(latest, config))
    fall = _mean(best) - _mean(latest)
    if fall > FALL * error and fall > 0:
        yield Alert(
            name="reward_collapsed",
            sentence=f"step {step}: the mean reward is {_mean(latest):.3f} over the latest {len(latest)} steps, "
            f"{_mean(best):.3f} over the best {size} before them; the difference is {fall / error if error else math.inf:.1f} "
            "standard errors",
            **_driven_too_far(config),
        )


def _held_out_collapsed(
    step: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]], config: TrainConfig
) -> Iterator[Alert]:
    """An evaluation FALL standard errors below the best before.

    All are of the same prompts and seeds, unless a run was resumed with others, so that is careful. Of a single image no
    error is known, and nothing is said.
    """
    before = [line for line in history if line.get(HELD_OUT) is not None]
    now = metrics.get(HELD_OUT)
    if not before or now is None or not math.isfinite(now):
        return
    best = max(before, key=lambda line: line[HELD_OUT])
    error = math.hypot(best.get(HELD_OUT_ERROR) or 0.0, metrics.get(HELD_OUT_ERROR) or 0.0)
    fall = best[HELD_OUT] - now
    if error and fall > FALL * error:
        yield Alert(
            name="held_out_collapsed",
            sentence=f"step {step}: the held-out reward is {now:.3f}, it was {best[HELD_OUT]:.3f} at step {best['step']}; the "
            f"difference is {fall / error:.1f} standard errors",
            **_driven_too_far(config),
        )


def _drifted_away(step: int, metrics: Mapping[str, float], config: TrainConfig) -> Iterator[Alert]:
    if (metrics.get(DRIFT) or 0.0) > FARTHEST:
        yield Alert(
            name="drifted_away",
            sentence=f"step {step}: the weights are {metrics[DRIFT]:.3g} times as far from those the run started from as those "
            "are from zero; the nano recipe ends at 0.02",
            **_driven_too_far(config),
        )


def _driven_too_far(config: TrainConfig) -> dict[str, str]:
    return {
        "cause": "a policy that was driven too far: learning rate or clip_range too high, or too many updates a rollout",
        "command": train_command(config, f"trainer.learning_rate={config.trainer.learning_rate / 10:g}"),
    }


def _mean(steps: Sequence[Mapping[str, Any]]) -> float:
    return fmean(line[MEAN] for line in steps)


def _error(steps: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Of the mean over these steps; images of one prompt are not independent, so the prompts are counted."""
    variance = fmean(line[STD] ** 2 for line in steps)
    return math.sqrt(variance / (config.rollout.prompts_per_step * len(steps)))
