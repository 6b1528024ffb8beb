"""Sigmas and timesteps: the one builder that the rollout and the trainer use."""

from __future__ import annotations

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
    """Noise levels of one denoising, after the resolution shift."""

    sigmas: torch.Tensor  # [N+1] fp32 on the CPU, strictly falling, ends with 0
    timesteps: torch.Tensor  # [N] fp32 on the CPU, 1000 * sigma


def build_schedule(scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, image_seq_len: int) -> Schedule:
    """The schedule Qwen-Image samples with: linear sigmas, shifted by the number of image tokens.

    `scheduler` gives the configuration only; it is not changed, so one object serves all requests.

    Raises:
        RequestError: fewer than two steps (with `shift_terminal`, diffusers' stretch of one step divides 0 by 0).
    """
    if num_inference_steps < 2:
        raise RequestError(f"num_inference_steps={num_inference_steps}: expected at least 2; give a larger number")
    own: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # diffusers' annotation says it may be a tuple
    config = own.config
    mu = calculate_shift(
        image_seq_len,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu, device="cpu")
    return Schedule(sigmas=own.sigmas.float().cpu(), timesteps=own.timesteps.float().cpu())


def model_timestep(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the transformer is told: timestep / 1000, divided in fp32 and rounded to `dtype` once.

    Rounding before the division moves up to a fifth of all steps by one bf16 unit; that alone makes a KL of 5e-4.
    """
    return (timesteps.float() / NUM_TRAIN_TIMESTEPS).to(dtype)
