"""Sigmas and timesteps: the one builder that the rollout and the trainer use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from omni_rollout.types import RequestError

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one denoising, after the shift."""

    sigmas: torch.Tensor  # [N+1] fp32 on the CPU, strictly falling, ends with 0
    timesteps: torch.Tensor  # [N] fp32 on the CPU, 1000 * sigma


WARM_UP = Schedule(sigmas=torch.tensor([1.0, 0.0]), timesteps=torch.tensor([1000.0]))  # one step, of the engine's start


def linear_sigmas(num_inference_steps: int) -> np.ndarray:
    """[N] fp64, from 1 to 1/N.

    Raises:
        RequestError: fewer than two steps (with `shift_terminal`, diffusers' stretch of one step divides 0 by 0).
    """
    _check_steps(num_inference_steps)
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)


def falling_sigmas(num_inference_steps: int) -> np.ndarray:
    """The same from 1 towards 0 with the end left out: as numbers equal to `linear_sigmas`, in their last bits not always."""
    _check_steps(num_inference_steps)
    return np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]


def _check_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 2:
        raise RequestError(f"num_inference_steps={num_inference_steps}: expected at least 2; give a larger number")


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Qwen-Image's mu: the more image tokens, the longer the schedule stays at high noise."""
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def build_schedule(
    config: Mapping[str, Any], sigmas: np.ndarray, *, mu: float | None = None, shift: float | None = None
) -> Schedule:
    """The schedule of diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        config: of the checkpoint's scheduler.
        sigmas: [N], before the shift.
        mu: of a dynamic shift, for a config that asks for one.
        shift: a static one, s -> shift s / (1 + (shift - 1) s), and nothing else of `config`.
    """
    if shift is not None:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    return Schedule(sigmas=scheduler.sigmas.float().cpu(), timesteps=scheduler.timesteps.float().cpu())


def model_timestep(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What Qwen-Image's transformer is told: timestep / 1000, divided in fp32 and rounded to `dtype` once.

    Rounding before the division moves up to a fifth of all steps by one bf16 unit; that alone makes a KL of 5e-4.
    """
    return (timesteps.float() / NUM_TRAIN_TIMESTEPS).to(dtype)
