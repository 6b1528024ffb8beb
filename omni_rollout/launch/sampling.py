"""Checks of `sampling.*` across its keys, and of what they need of the family."""

from __future__ import annotations

import math
from collections.abc import Iterator

from omni_rollout.config import SamplingConfig, SDETypeName, TrainConfig
from omni_rollout.models import families, family_module
from omni_rollout.models.base.sampling import width_problem

_LARGEST_SIDE = 2**16  # more is a slip of the hand


def sampling_problems(sampling: SamplingConfig) -> Iterator[str]:
    if not 0 <= sampling.seed < 2**63:
        yield f"sampling.seed={sampling.seed}: expected 0 to 2**63 - 1"
    for key, value in (("noise_level", sampling.noise_level), ("true_cfg_scale", sampling.true_cfg_scale)):
        if value is not None and not math.isfinite(value):
            yield f"sampling.{key}={value}: expected a finite number"
    for key, pixels in (("height", sampling.height), ("width", sampling.width)):
        if pixels is not None and (not 16 <= pixels <= _LARGEST_SIDE or pixels % 16):
            yield f"sampling.{key}={pixels}: expected a multiple of 16, from 16 to {_LARGEST_SIDE}"
    if sampling.true_cfg_scale is not None and not sampling.true_cfg_scale >= 0:
        yield f"sampling.true_cfg_scale={sampling.true_cfg_scale}: expected 0 or more; 1.0 and below turn guidance off"
    if sampling.sde_type is not SDETypeName.ode and sampling.noise_level == 0:
        yield "sampling.noise_level=0: a step without noise has no density; give a level above 0, or sampling.sde_type=ode"
    if sampling.sde_type is SDETypeName.cps and sampling.noise_level > 1:
        yield f"sampling.noise_level={sampling.noise_level}: cps expects 0 to 1 (it is a share of a quarter turn)"
    yield from _window(sampling)


def width_problems(config: TrainConfig) -> Iterator[str]:
    if config.model.family in families():
        problem = width_problem(config.collate.width.value, family_module(config.model.family, "spec").RULES)
        yield from [] if problem is None else [problem]


def _window(sampling: SamplingConfig) -> Iterator[str]:
    window, steps, size = sampling.sde_window_range, sampling.num_inference_steps, sampling.sde_window_size
    if window is not None and (len(window) != 2 or not 0 <= window[0] < window[1]):
        yield f"sampling.sde_window_range={window}: expected [first, end] with 0 <= first < end"
        return
    if window is not None and steps is not None and window[1] > steps - 1:
        yield f"sampling.sde_window_range={window}: the last of {steps} steps is deterministic; end at {steps - 1} or before"
    first, end = window if window is not None else (0, None if steps is None else steps - 1)
    if size is not None and end is not None and size > end - first:
        yield f"sampling.sde_window_size={size}: the range has {end - first} steps; give a smaller window or a wider range"
