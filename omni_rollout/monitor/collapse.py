"""Whether the reward that training raises has fallen, beyond the noise between steps."""

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
            cause="a policy that was driven too far: learning rate or clip_range too high, or too many updates a rollout",
            command=train_command(config, f"trainer.learning_rate={config.trainer.learning_rate / 10:g}"),
        )


def _mean(steps: Sequence[Mapping[str, Any]]) -> float:
    return fmean(line[MEAN] for line in steps)


def _error(steps: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Of the mean over these steps; images of one prompt are not independent, so the prompts are counted."""
    variance = fmean(line[STD] ** 2 for line in steps)
    return math.sqrt(variance / (config.rollout.prompts_per_step * len(steps)))
