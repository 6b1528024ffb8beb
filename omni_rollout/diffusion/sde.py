"""One denoising step as a Gaussian: draws the next latents, or scores given ones, never both.

All four step types are linear in the latents x and the velocity v, so each is three numbers:
mean = cx * x + cv * v, and the standard deviation of the step. The numbers are worked out in Python floats (fp64) for
each row by itself, so neither the device nor the batch can change them; the tensors are fp32.

Sources: `sde` Flow-GRPO (arXiv 2505.05470, eq. 12), `cps` Flow-CPS (arXiv 2509.05952), `dance_sde` DanceGRPO
(arXiv 2505.07818), `ode` the Euler step of rectified flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from omni_rollout.types import LogProbForm, SDEType


@dataclass(frozen=True)
class SDEStep:
    """The next latents and how likely they were."""

    prev_sample: torch.Tensor  # [B, ...] fp32
    log_prob: torch.Tensor  # [B] fp32, mean over its elements; 0 for `ode`, which has no density
    mean: torch.Tensor  # [B, ...] fp32
    step_std: torch.Tensor  # [B] fp32, of the whole step: sqrt(-dt) is in it


def _flow_grpo(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float, float]:
    dt = sigma_next - sigma
    # sigma = 1 would divide by zero; the published code takes the schedule's next sigma there.
    rate = noise_level * math.sqrt(sigma / (1 - (sigma_next if sigma >= 1 else sigma)))
    return _reverse_sde(sigma, dt, rate)


def _dance(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float, float]:
    return _reverse_sde(sigma, sigma_next - sigma, noise_level)


def _reverse_sde(sigma: float, dt: float, rate: float) -> tuple[float, float, float]:
    drift = rate**2 / (2 * sigma)
    return 1 + drift * dt, (1 + drift * (1 - sigma)) * dt, rate * math.sqrt(-dt)


def _flow_cps(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float, float]:
    step_std = sigma_next * math.sin(noise_level * math.pi / 2)
    keep = math.sqrt(sigma_next**2 - step_std**2)
    return (1 - sigma_next) + keep, (1 - sigma) * keep - sigma * (1 - sigma_next), step_std


def _euler(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float, float]:
    return 1.0, sigma_next - sigma, 0.0


COEFFICIENTS = {"sde": _flow_grpo, "cps": _flow_cps, "dance_sde": _dance, "ode": _euler}


def step_coefficients(sigma: float, sigma_next: float, noise_level: float, sde_type: SDEType) -> tuple[float, float, float]:
    """(cx, cv, step_std) of one step from sigma down to sigma_next.

    Raises:
        ValueError: an unknown sde_type, sigmas that do not fall, or a stochastic step without noise.
    """
    if sde_type not in COEFFICIENTS:
        raise ValueError(f"sde_type={sde_type!r}: expected one of {', '.join(COEFFICIENTS)}")
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"sigma={sigma}, sigma_next={sigma_next}: expected 0 <= sigma_next < sigma <= 1")
    if sde_type == "cps" and not 0 <= noise_level <= 1:
        raise ValueError(f"noise_level={noise_level}: cps expects 0 to 1 (it is a share of a quarter turn)")
    cx, cv, step_std = COEFFICIENTS[sde_type](sigma, sigma_next, noise_level)
    if sde_type != "ode" and not 0 < step_std < math.inf:
        raise ValueError(
            f"{sde_type} step from sigma={sigma} to {sigma_next} at noise_level={noise_level} has step_std={step_std}, "
            "so no density; use ode for this step (an SDE window that ends earlier), or a finite noise_level above 0"
        )
    return cx, cv, step_std


def sde_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    sigma: torch.Tensor | float,
    sigma_next: torch.Tensor | float,
    *,
    noise_level: float,
    sde_type: SDEType,
    generator: torch.Generator | None = None,
    prev_sample: torch.Tensor | None = None,
    log_prob_form: LogProbForm = "gaussian",
) -> SDEStep:
    """Takes (generator) or scores (prev_sample) one step of the reverse process.

    Args:
        velocity, sample: [B, ...] fp32.
        sigma, sigma_next: one number, or [B].
        generator: draws the noise, on its own device; `ode` needs none.
        prev_sample: [B, ...] fp32, the latents to score.
        log_prob_form: `gaussian`, the density; `unnormalised`, -(x' - mean)^2, the form Flow-CPS publishes.

    Raises:
        ValueError: both or neither of generator and prev_sample, another dtype than fp32, or an impossible step.
    """
    for name, tensor in (("velocity", velocity), ("sample", sample), ("prev_sample", prev_sample)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: expected float32; latents are never rounded to the model's dtype")
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected that of sample, {list(sample.shape)}")
    rows = sample.shape[0]
    table = [
        step_coefficients(s, n, noise_level, sde_type)
        for s, n in zip(_per_row(sigma, rows), _per_row(sigma_next, rows), strict=True)
    ]
    cx, cv, step_std = (
        per_sample(torch.tensor(column, dtype=torch.float32, device=sample.device), sample)
        for column in zip(*table, strict=True)
    )
    mean = cx * sample + cv * velocity
    if sde_type == "ode":
        if prev_sample is not None:
            raise ValueError("an ode step has no density to score: score stochastic steps only")
        return SDEStep(prev_sample=mean, log_prob=mean.new_zeros(rows), mean=mean, step_std=step_std.flatten())
    if (generator is None) == (prev_sample is None):
        raise ValueError("give either a generator (to draw) or prev_sample (to score), not both and not neither")
    if prev_sample is None:
        assert generator is not None
        noise = torch.randn(sample.shape, generator=generator, device=generator.device, dtype=torch.float32)
        prev_sample = mean + step_std * noise.to(sample.device)
    log_prob = gaussian_log_prob(prev_sample, mean, step_std, [row[2] for row in table], log_prob_form)
    return SDEStep(prev_sample=prev_sample, log_prob=log_prob, mean=mean, step_std=step_std.flatten())


def gaussian_log_prob(
    prev_sample: torch.Tensor, mean: torch.Tensor, step_std: torch.Tensor, stds: list[float], form: LogProbForm
) -> torch.Tensor:
    """[B] fp32: mean over elements, each sample's summed by itself, in fp64: company may change the order of a sum."""
    squared = (prev_sample - mean) ** 2
    if form == "unnormalised":
        return _means(-squared).float()
    if form != "gaussian":
        raise ValueError(f"log_prob_form={form!r}: expected gaussian or unnormalised")
    constant = torch.tensor([-math.log(std) - 0.5 * math.log(2 * math.pi) for std in stds], dtype=torch.float64)
    quadratic = _means(squared / (2 * step_std**2))
    return (constant.to(mean.device) - quadratic).float()


def gaussian_kl(mean: torch.Tensor, other_mean: torch.Tensor, step_std: torch.Tensor) -> torch.Tensor:
    """KL between two steps of equal step_std, [B] fp32, mean over elements: |mean - other|^2 / (2 step_std^2)."""
    squared = (mean - other_mean) ** 2 / (2 * per_sample(step_std, mean) ** 2)
    return _means(squared).float()


def per_sample(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...], to multiply a tensor [B, ...] by."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _means(values: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B] fp64."""
    return torch.stack([sample.double().mean() for sample in values])


def _per_row(value: torch.Tensor | float, rows: int) -> list[float]:
    values = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    if len(values) not in (1, rows):
        raise ValueError(f"{len(values)} sigmas for {rows} samples: expected one, or one a sample")
    return values * rows if len(values) == 1 else values
