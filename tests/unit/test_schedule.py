"""The schedule against diffusers' own pipeline helpers and against the formula by hand; timesteps against double rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

from omni_rollout.diffusion.schedule import Schedule, build_schedule, linear_sigmas, model_timestep, resolution_shift
from omni_rollout.types import RequestError

STEPS = (2, 3, 10, 20, 28, 50)
IMAGE_SEQ_LENS = (16, 256, 1024, 4096, 8192)


def qwen_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def built(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> Schedule:
    return build_schedule(scheduler.config, linear_sigmas(steps), mu=resolution_shift(scheduler.config, tokens))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("image_seq_len", IMAGE_SEQ_LENS)
def test_equals_what_the_diffusers_pipeline_builds(steps: int, image_seq_len: int) -> None:
    scheduler = qwen_image_scheduler()
    mu = calculate_shift(image_seq_len, 256, 8192, 0.5, 0.9)
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = built(qwen_image_scheduler(), steps, image_seq_len)
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    assert torch.equal(schedule.timesteps, timesteps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("image_seq_len", IMAGE_SEQ_LENS)
def test_equals_the_formula_worked_by_hand(steps: int, image_seq_len: int) -> None:
    mu = 0.5 + (0.9 - 0.5) * (image_seq_len - 256) / (8192 - 256)
    linear = [1 - i * (1 - 1 / steps) / (steps - 1) for i in range(steps)]
    shifted = [math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)) for sigma in linear]
    stretch = (1 - shifted[-1]) / (1 - 0.02)
    expected = torch.tensor([*(1 - (1 - sigma) / stretch for sigma in shifted), 0.0], dtype=torch.float64)
    schedule = built(qwen_image_scheduler(), steps, image_seq_len)
    torch.testing.assert_close(schedule.sigmas.double(), expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(schedule.timesteps.double(), 1000 * expected[:-1], rtol=0, atol=2e-4)
    assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0 and (schedule.sigmas.diff() < 0).all()
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == torch.float32


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_fewer_than_two_steps_are_refused(steps: int) -> None:
    with pytest.raises(RequestError, match=f"num_inference_steps={steps}: expected at least 2"):
        built(qwen_image_scheduler(), steps, 256)


def test_the_given_scheduler_is_not_changed() -> None:
    scheduler = qwen_image_scheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5)
    before = (dict(scheduler.config), scheduler.sigmas.clone(), scheduler.timesteps.clone(), scheduler.step_index)
    first = built(scheduler, 10, 256)
    built(scheduler, 20, 4096)
    assert torch.equal(scheduler.sigmas, before[1]) and torch.equal(scheduler.timesteps, before[2])
    assert dict(scheduler.config) == before[0] and scheduler.step_index == before[3]
    assert torch.equal(built(scheduler, 10, 256).sigmas, first.sigmas)


@pytest.mark.parametrize(("steps", "moved"), [(10, 1), (20, 1), (28, 1), (50, 1)])
def test_timestep_is_rounded_once(steps: int, moved: int) -> None:
    timesteps = built(qwen_image_scheduler(), steps, 4096).timesteps
    once = model_timestep(timesteps, torch.bfloat16)
    assert torch.equal(model_timestep(timesteps, torch.float32), timesteps / 1000)
    assert once.dtype == torch.bfloat16
    neighbours = torch.stack([torch.nextafter(once, torch.full_like(once, to)) for to in (-math.inf, math.inf)])
    error = (once.double() - timesteps.double() / 1000).abs()
    assert (error <= (neighbours.double() - timesteps.double() / 1000).abs()).all()
    twice = timesteps.to(torch.bfloat16) / 1000
    assert (once != twice).sum() >= moved  # or this test could not tell the two apart
