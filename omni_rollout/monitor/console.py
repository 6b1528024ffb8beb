"""One line a step: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omni_rollout.monitor.alerts import Alert
from omni_rollout.monitor.pairs import ENGINE_AGAINST_TRAINER

_TIMES = "timing_s/"
_WHOLE_STEP = f"{_TIMES}step"
_EVALUATION = "evaluation/"


def step_line(metrics: Mapping[str, float]) -> str:
    """Reward, KL, clip fraction and seconds per stage, as far as they are given.

    A KL of `0.0` is exactly zero. Where single log-probs differ, the largest difference follows, for signs cancel in the KL.
    """
    parts = []
    if "critic/rewards/mean" in metrics:
        parts.append(f"reward {metrics['critic/rewards/mean']:.3f}")
    if "parity/ppo_kl_mb0" in metrics:
        kl, largest = metrics["parity/ppo_kl_mb0"], metrics.get("rollout_corr/logprob_abs_diff_max", 0.0)
        parts.append(f"kl {_exact(kl)}" + ("" if largest == 0 else f" (max {_exact(largest)})"))
    elif "actor/pg_loss" in metrics:
        parts.append("kl not applicable")  # a forward algorithm: nothing was scored
    if "actor/pg_clipfrac" in metrics:
        parts.append(f"clip {metrics['actor/pg_clipfrac']:.2f}")
    parts += [f"{key} {value:.3f}" for key, value in metrics.items() if key.startswith(_EVALUATION)]
    times = [
        f"{key.removeprefix(_TIMES)} {value:.3g}s"
        for key, value in metrics.items()
        if key.startswith(_TIMES) and key != _WHOLE_STEP
    ]
    return "  ".join([*parts, " ".join(times)] if times else parts)


def _exact(value: float) -> str:
    return "0.0" if value == 0 else f"{value:.1e}"


class ConsoleSink:
    """Prints `step 3/30  reward 0.520  kl 0.0  ...`; on a terminal the last line is also a bar with the time left."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._progress: Progress | None = None
        self._explained = False
        if sys.stdout.isatty():
            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=Console(), refresh_per_second=1)
            self._task = self._progress.add_task("starting", total=total_steps)
            self._progress.start()

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
            self._print(f"kl: {ENGINE_AGAINST_TRAINER}, per element, before the step's first update (parity/ppo_kl_mb0)")
        repeated = "".join(f"  ALERT {name} ({count} steps so far)" for name, count in (again or {}).items())
        self._print(f"step {step}/{self._total}  {step_line(metrics)}{repeated}")
        for alert in new:
            self._print(f"ALERT {alert.name}, {alert.text}".replace("\n", "\n      "), style="bold red")
        if self._progress is not None:
            reward = metrics.get("critic/rewards/mean")
            self._progress.update(self._task, completed=step, description="" if reward is None else f"reward {reward:.3f}")

    def _print(self, line: str, style: str | None = None) -> None:
        if self._progress is None:
            print(line, flush=True)
        else:
            self._progress.console.print(line, highlight=False, markup=False, style=style)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
