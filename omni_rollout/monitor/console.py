"""One line a step on stdout, under what `Progress` shows of the work in between."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from omni_rollout.launch.progress import Progress
from omni_rollout.monitor.alerts import Alert
from omni_rollout.monitor.pairs import ENGINE_AGAINST_TRAINER

_TIMES = "timing_s/"
_WHOLE_STEP = f"{_TIMES}step"
_EVALUATION = "evaluation/"
_SHORTEST = 0.005  # seconds of a stage that is worth telling
_EXPLAINED = (
    f"gap: {ENGINE_AGAINST_TRAINER}, mean difference of a log-prob before the step's first update (parity/ppo_kl_mb0); 0.0 is "
    "exact equality.\ndrift: how far the weights are from those the run started from, relative (actor/drift)"
)


def step_line(metrics: Mapping[str, float]) -> str:
    """Reward, gap between engine and trainer, drift, clip fraction and seconds per stage, as far as they are given.

    A gap of `0.0` is exactly zero. Where single log-probs differ, the largest difference follows, for signs cancel in the mean.
    """
    parts = []
    if "critic/rewards/mean" in metrics:
        parts.append(f"reward {metrics['critic/rewards/mean']:.3f}")
    if "parity/ppo_kl_mb0" in metrics:
        kl, largest = metrics["parity/ppo_kl_mb0"], metrics.get("rollout_corr/logprob_abs_diff_max", 0.0)
        parts.append(f"engine-trainer gap {_exact(kl)}" + ("" if largest == 0 else f" (max {_exact(largest)})"))
    if "actor/drift" in metrics:
        parts.append(f"drift {_exact(metrics['actor/drift'])}")
    if "actor/pg_clipfrac" in metrics:
        parts.append(f"clip {metrics['actor/pg_clipfrac']:.2f}")
    parts += [f"{key} {value:.3f}" for key, value in metrics.items() if key.startswith(_EVALUATION) and not _is_error(key)]
    times = [
        f"{key.removeprefix(_TIMES)} {value:.3g}s"
        for key, value in metrics.items()
        if key.startswith(_TIMES) and key != _WHOLE_STEP and value >= _SHORTEST
    ]
    return "  ".join([*parts, " ".join(times)] if times else parts)


def _is_error(key: str) -> bool:
    """Whether it is the standard error of another metric, of an average's too."""
    return key.removesuffix("_ema").endswith("_se")


def _exact(value: float) -> str:
    return "0.0" if value == 0 else f"{value:.1e}"


class ConsoleSink:
    """Prints `step 3/30  reward 0.520  engine-trainer gap 0.0  ...`.

    Args:
        progress: shows what is being done in between; None: nothing does.
    """

    def __init__(self, total_steps: int, progress: Progress | None = None) -> None:
        self._total = total_steps
        self._progress = progress or Progress(shown=False)
        self._explained = False
        self._seconds: list[float] = []

    def log(
        self, step: int, metrics: Mapping[str, float], new: Sequence[Alert] = (), again: Mapping[str, int] | None = None
    ) -> None:
        """Prints one step.

        Args:
            new: alerts of a kind not seen before, spelled out below the line.
            again: those seen before, with the number of steps that had them, named in the line.
        """
        if "parity/ppo_kl_mb0" in metrics and not self._explained:
            self._explained = True
            self._progress.result(_EXPLAINED)
        repeated = "".join(f"  ALERT {name} ({count} steps so far)" for name, count in (again or {}).items())
        self._progress.result(f"step {step}/{self._total}  {step_line(metrics)}{self._left(step, metrics)}{repeated}")
        for alert in new:
            self._progress.result(f"ALERT {alert.name}, {alert.text}".replace("\n", "\n      "), style="bold red")

    def say(self, text: str) -> None:
        self._progress.result(text)

    def _left(self, step: int, metrics: Mapping[str, float]) -> str:
        """`  4 min left`, by the median step so far."""
        if _WHOLE_STEP in metrics:
            self._seconds.append(metrics[_WHOLE_STEP])
        left = (self._total - step) * statistics.median(self._seconds) if self._seconds else 0.0
        return f"  {left / 60:.0f} min left" if left >= 60 else ""
