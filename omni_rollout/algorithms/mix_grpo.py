"""MixGRPO (arXiv 2507.21802): Flow-GRPO's loss on a window of steps that moves along the schedule as training goes on.

The window {l, ..., l + w - 1} is stochastic, all other steps are deterministic; w is `sampling.sde_window_size`, and l stays
within `sampling.sde_window_range`:

    progressive   l moves by window_stride after window_every steps of training, and starts again when it has reached the end
    random        l is drawn for each step of training, from window_seed
    fixed         l is the first of the range (the paper's frozen window)

In the published code the window shrinks at the end of the schedule, and is empty once; here it stays whole. Its KL is to the
policy that sampled, not to the one the run started from; here `kl_coef` means the latter, and is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import TrainConfig

WINDOWS = ("progressive", "random", "fixed")


@dataclass
class MixGRPO(FlowGRPO):
    advantage_std: str = "group"
    advantage_deviation: str = "sample"
    advantage_eps: float = 1e-8
    window: str = "progressive"  # or random, fixed
    window_every: int = 25  # steps of training for which a progressive window stays; the paper's tau
    window_stride: int = 1  # denoising steps by which it moves
    window_seed: int = 42  # of random windows

    def window_start(self, step: int, first: int, last: int, draw: Random) -> int:
        if self.window == "fixed":
            return first
        if self.window == "random":
            return Random(f"{self.window_seed}/{step}").randint(first, last)
        return first + (step - 1) // self.window_every * self.window_stride % (last - first + 1)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if self.window not in WINDOWS:
            yield f"algorithm.window={self.window}: expected one of {', '.join(WINDOWS)}"
        if self.window_every < 1:
            yield f"algorithm.window_every={self.window_every}: expected at least 1"
        if self.window_stride < 0:
            yield f"algorithm.window_stride={self.window_stride}: expected 0 or more; 0 keeps the window where it starts"
        if config.sampling.sde_window_size is None:
            yield "sampling.sde_window_size=null: mix_grpo moves a window; give its size, such as sampling.sde_window_size=4"
