"""`python benchmarks/faults/planted.py FAULT train KEY=VALUE...`: the command line, with a fault inside its process.

nan     in the backward pass of step 2, one parameter's gradient is NaN
hang    in step 2, the engine's thread stops before a denoising step, for ever
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

from omni_rollout import train as loop
from omni_rollout.cli import main
from omni_rollout.policy.learner import Learner
from omni_rollout.rollout import choice
from omni_rollout.rollout.engine import RolloutEngine

STEP = 2
STEPS_BEFORE_THE_HANG = 100  # forward passes of the transformer within that step: some of its images are finished by then


class LearnerWithNaN(Learner):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step = 0
        self.parameters[0].register_hook(lambda gradient: gradient * torch.nan if self._step == STEP else gradient)

    def step(self, trajectories: Any, advantages: Any, old: Any, step: int) -> Any:
        self._step = step
        return super().step(trajectories, advantages, old, step)


class HangingEngine(RolloutEngine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes = 0
        self.pipeline.transformer.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._passes += self.policy_version == STEP - 1
        if self._passes > STEPS_BEFORE_THE_HANG:
            threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "nan":
        loop.Learner = LearnerWithNaN  # type: ignore[misc]
    else:
        choice.RolloutEngine = HangingEngine  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
