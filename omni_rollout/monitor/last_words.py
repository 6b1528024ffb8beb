"""What stops a run, in its metrics and alerts, and what to do next."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omni_rollout.errors import WeightSyncError
from omni_rollout.monitor.guard import StoppedError
from omni_rollout.monitor.monitor import Monitor
from omni_rollout.rewards import RewardError
from omni_rollout.run.checkpoints import how_to_go_on


@contextmanager
def last_words(sight: Monitor, step: int) -> Iterator[None]:
    """Writes the last line of metrics where the run itself was stopped, and says of any error how to go on after it.

    Nothing is saved: a step that failed must not reach a checkpoint.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WeightSyncError):
            sight.log(step, {"parity/weights_equal": 0.0}, notes={"weights/difference": str(error)})
        elif isinstance(error, RewardError):
            sight.log(step, {}, notes={"rewards/failure": str(error)})
        elif isinstance(error, StoppedError):
            sight.log(step, error.metrics, notes={"stopped": str(error)})
        print(f"stopped in step {step}; {how_to_go_on(sight.run_dir)}", file=sys.stderr, flush=True)
        raise
