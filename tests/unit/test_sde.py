"""Step types against their papers' own forms, in plain floats; and the bits: drawing and scoring agree."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.diffusion.sde import gaussian_kl, sde_step, step_coefficients
from omni_rollout.types import SDEType

STOCHASTIC = ("sde", "cps", "dance_sde")
SHAPE = (3, 5, 8)
SIGMAS = st.tuples(st.floats(0.02, 1.0), st.floats(0.01, 0.95)).map(lambda pair: (pair[0], pair[0] * pair[1]))
NOISE_LEVELS = st.floats(0.05, 1.0)
NUMBERS = st.floats(-4, 4)


def tensors(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def flow_grpo(x: float, v: float, s: float, s_next: float, a: float) -> tuple[float, float]:
    """arXiv 2505.05470: x + [v + g^2/(2s) * (x + (1-s) v)] dt, noise g sqrt(-dt), g = a sqrt(s / (1-s))."""
    dt = s_next - s
    g = a * math.sqrt(s / (1 - (s_next if s == 1 else s)))
    return x + (v + g**2 / (2 * s) * (x + (1 - s) * v)) * dt, g * math.sqrt(-dt)


def flow_cps(x: float, v: float, s: float, s_next: float, a: float) -> tuple[float, float]:
    """arXiv 2509.05952: predicted clean image and predicted noise, mixed anew so that the noise adds up to s_next."""
    clean, noise = x - s * v, x + (1 - s) * v
    std = s_next * math.sin(a * math.pi / 2)
    return (1 - s_next) * clean + math.sqrt(s_next**2 - std**2) * noise, std


def dance_grpo(x: float, v: float, s: float, s_next: float, a: float) -> tuple[float, float]:
    """arXiv 2505.07818: the Euler step of the reverse SDE, drift v - a^2/2 * score, with the score of N((1-s) x0, s^2)."""
    dt = s_next - s
    clean = x - s * v
    score = -(x - (1 - s) * clean) / s**2
    return x + (v - a**2 / 2 * score) * dt, a * math.sqrt(-dt)


PUBLISHED = {"sde": flow_grpo, "cps": flow_cps, "dance_sde": dance_grpo}


def test_every_sde_type_is_tested() -> None:
    assert {*STOCHASTIC, "ode"} == set(get_args(SDEType)) and set(PUBLISHED) == set(STOCHASTIC)


@pytest.mark.parametrize("sde_type", STOCHASTIC)
@given(sigmas=SIGMAS, noise_level=NOISE_LEVELS, x=NUMBERS, v=NUMBERS)
@settings(deadline=None, max_examples=100)
def test_coefficients_are_the_published_formula(
    sde_type: SDEType, sigmas: tuple[float, float], noise_level: float, x: float, v: float
) -> None:
    cx, cv, step_std = step_coefficients(*sigmas, noise_level, sde_type)
    mean, std = PUBLISHED[sde_type](x, v, *sigmas, noise_level)
    size = abs(cx * x) + abs(cv * v) + 1
    assert cx * x + cv * v == pytest.approx(mean, rel=1e-9, abs=1e-9 * size)
    assert step_std == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_step_is_the_published_formula(sde_type: SDEType) -> None:
    velocity, sample = tensors()
    sigmas, following = [1.0, 0.7, 0.3], [0.9, 0.5, 0.02]
    step = sde_step(velocity, sample, torch.tensor(sigmas), torch.tensor(following), noise_level=0.7, sde_type=sde_type,
                    generator=torch.Generator().manual_seed(1))  # fmt: skip
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for row, (s, s_next) in enumerate(zip(sigmas, following, strict=True)):
        for token, channel in ((0, 0), (4, 7)):
            x, v = sample[row, token, channel].item(), velocity[row, token, channel].item()
            mean, std = PUBLISHED[sde_type](x, v, s, s_next, 0.7)
            assert step.mean[row, token, channel].item() == pytest.approx(mean, rel=1e-5, abs=1e-5)
            drawn = mean + std * noise[row, token, channel].item()
            assert step.prev_sample[row, token, channel].item() == pytest.approx(drawn, rel=1e-5, abs=1e-5)
        assert step.step_std[row].item() == pytest.approx(std, rel=1e-6)


def test_ode_is_the_euler_step_of_diffusers() -> None:
    velocity, sample = tensors()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2])
    for index in range(4):
        expected = scheduler.step(velocity, scheduler.timesteps[index], sample).prev_sample
        step = sde_step(velocity, sample, scheduler.sigmas[index], scheduler.sigmas[index + 1], noise_level=0.7, sde_type="ode")
        torch.testing.assert_close(step.prev_sample, expected, rtol=0, atol=5e-7)
        assert torch.equal(step.prev_sample, step.mean)
        assert torch.equal(step.log_prob, torch.zeros(3)) and torch.equal(step.step_std, torch.zeros(3))


@pytest.mark.parametrize("sde_type", STOCHASTIC)
@given(sigmas=SIGMAS, noise_level=NOISE_LEVELS, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_log_prob_is_the_density_of_a_normal(
    sde_type: SDEType, sigmas: tuple[float, float], noise_level: float, seed: int
) -> None:
    velocity, sample = tensors(seed)
    step = sde_step(velocity, sample, *sigmas, noise_level=noise_level, sde_type=sde_type,
                    generator=torch.Generator().manual_seed(seed))  # fmt: skip
    normal = torch.distributions.Normal(step.mean.double(), step.step_std.double().reshape(-1, 1, 1))
    expected = normal.log_prob(step.prev_sample.double()).mean(dim=(1, 2))
    torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-6, atol=1e-5)


def test_unnormalised_log_prob_is_minus_the_squared_distance() -> None:
    velocity, sample = tensors()
    arguments = {"sigma": 0.7, "sigma_next": 0.5, "noise_level": 0.8, "sde_type": "cps"}
    step = sde_step(velocity, sample, **arguments, generator=torch.Generator().manual_seed(1), log_prob_form="unnormalised")
    torch.testing.assert_close(step.log_prob, -((step.prev_sample - step.mean) ** 2).mean(dim=(1, 2)))


@pytest.mark.parametrize("form", ["gaussian", "unnormalised"])
@pytest.mark.parametrize("sde_type", STOCHASTIC)
@given(sigmas=SIGMAS, noise_level=NOISE_LEVELS, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_scoring_what_was_drawn_gives_the_same_bits(
    sde_type: SDEType, form: str, sigmas: tuple[float, float], noise_level: float, seed: int
) -> None:
    velocity, sample = tensors(seed)
    arguments = {"noise_level": noise_level, "sde_type": sde_type, "log_prob_form": form}
    drawn = sde_step(velocity, sample, *sigmas, **arguments, generator=torch.Generator().manual_seed(seed))
    scored = sde_step(velocity, sample, *sigmas, **arguments, prev_sample=drawn.prev_sample)
    for field in ("prev_sample", "log_prob", "mean", "step_std"):
        assert torch.equal(getattr(drawn, field), getattr(scored, field)), field


@pytest.mark.parametrize("sde_type", STOCHASTIC)
@pytest.mark.parametrize("tokens", [1, 16, 257])
def test_rows_of_a_batch_are_the_rows_alone(sde_type: SDEType, tokens: int) -> None:
    shape = (7, tokens, 64)
    velocity, sample = tensors(shape=shape)
    prev_sample = sample + 0.1 * tensors(1, shape)[0]
    sigma, sigma_next = torch.linspace(1, 0.3, 7), torch.linspace(0.9, 0.02, 7)
    arguments = {"noise_level": 0.7, "sde_type": sde_type}
    together = sde_step(velocity, sample, sigma, sigma_next, **arguments, prev_sample=prev_sample)
    for row in range(7):
        one = slice(row, row + 1)
        alone = sde_step(
            velocity[one], sample[one], sigma[row], sigma_next[row], **arguments, prev_sample=prev_sample[one].clone()
        )
        for field in ("log_prob", "mean", "step_std"):
            assert torch.equal(getattr(together, field)[one], getattr(alone, field)), (field, row)


def test_at_sigma_one_the_flow_grpo_rate_takes_the_next_sigma() -> None:
    *_, step_std = step_coefficients(1.0, 0.9, 0.7, "sde")
    assert step_std == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))


@pytest.mark.parametrize("sde_type", ["sde", "dance_sde"])
def test_step_std_includes_the_square_root_of_dt(sde_type: SDEType) -> None:
    short = step_coefficients(0.6, 0.5, 0.7, sde_type)[2]
    long = step_coefficients(0.6, 0.2, 0.7, sde_type)[2]
    assert long / short == pytest.approx(2.0)


@pytest.mark.parametrize(("sigma", "noise_level"), [(0.8, 0.7), (0.6, 0.3)])
def test_gaussian_kl_is_that_of_torch(sigma: float, noise_level: float) -> None:
    velocity, sample = tensors()
    one, other = (
        sde_step(v, sample, sigma, 0.5, noise_level=noise_level, sde_type="sde", prev_sample=sample)
        for v in (velocity, -velocity)
    )
    std = one.step_std.reshape(-1, 1, 1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(one.mean, std), torch.distributions.Normal(other.mean, std)
    )
    torch.testing.assert_close(gaussian_kl(one.mean, other.mean, one.step_std), expected.mean(dim=(1, 2)))
    assert torch.equal(gaussian_kl(one.mean, one.mean, one.step_std), torch.zeros(3))


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_gradient_with_respect_to_the_velocity(sde_type: SDEType) -> None:
    velocity, sample = tensors()
    prev_sample = sample + 0.2 * tensors(1)[0]
    velocity.requires_grad_()
    step = sde_step(velocity, sample, 0.7, 0.5, noise_level=0.7, sde_type=sde_type, prev_sample=prev_sample)
    (gradient,) = torch.autograd.grad(step.log_prob.sum(), velocity)
    _, cv, std = step_coefficients(0.7, 0.5, 0.7, sde_type)
    closed_form = cv * (prev_sample - step.mean.detach()) / std**2 / (SHAPE[1] * SHAPE[2])
    torch.testing.assert_close(gradient, closed_form, rtol=1e-4, atol=1e-6)
    x, v, drawn = sample[1, 2, 3].item(), velocity[1, 2, 3].item(), prev_sample[1, 2, 3].item()

    def element_log_prob(value: float) -> float:
        mean, std = PUBLISHED[sde_type](x, value, 0.7, 0.5, 0.7)
        return -((drawn - mean) ** 2) / (2 * std**2) / (SHAPE[1] * SHAPE[2])

    difference = (element_log_prob(v + 1e-4) - element_log_prob(v - 1e-4)) / 2e-4
    assert gradient[1, 2, 3].item() == pytest.approx(difference, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": None}, "not both and not neither"),
        ({"prev_sample": torch.zeros(SHAPE)}, "not both and not neither"),
        ({"velocity": torch.zeros(SHAPE, dtype=torch.bfloat16)}, "velocity is torch.bfloat16"),
        ({"sample": torch.zeros(SHAPE, dtype=torch.float64)}, "sample is torch.float64"),
        ({"generator": None, "prev_sample": torch.zeros(SHAPE, dtype=torch.bfloat16)}, "prev_sample is torch.bfloat16"),
        ({"generator": None, "prev_sample": torch.zeros(1, *SHAPE[1:])}, "prev_sample has shape"),
        ({"velocity": torch.zeros(1, *SHAPE[1:])}, "velocity has shape"),
        ({"sigma": torch.tensor([0.7, 0.6])}, "2 sigmas for 3 samples"),
        ({"sde_type": "cps", "sigma_next": 0.0}, "so no density"),
        ({"sde_type": "sde", "noise_level": 0.0}, "so no density"),
        ({"sde_type": "cps", "noise_level": 0.0}, "so no density"),
        ({"sde_type": "dance_sde", "noise_level": 0.0}, "so no density"),
        ({"noise_level": math.nan}, "so no density"),
        ({"noise_level": math.inf}, "so no density"),
        ({"sde_type": "cps", "noise_level": 1.5}, "cps expects 0 to 1"),
        ({"sde_type": "euler"}, "expected one of sde, cps, dance_sde, ode"),
        ({"sigma": 0.5, "sigma_next": 0.5}, "sigma_next < sigma"),
        ({"sigma": 0.5, "sigma_next": 0.6}, "sigma_next < sigma"),
        ({"sigma": 1.5}, "sigma_next < sigma"),
        ({"sigma": math.nan}, "sigma_next < sigma"),
        ({"sde_type": "ode", "generator": None, "prev_sample": torch.zeros(SHAPE)}, "no density to score"),
        ({"log_prob_form": "mean"}, "expected gaussian or unnormalised"),
    ],
)
def test_impossible_steps_are_refused(change: dict[str, object], message: str) -> None:
    velocity, sample = tensors()
    arguments = {"velocity": velocity, "sample": sample, "sigma": 0.7, "sigma_next": 0.5, "noise_level": 0.7,
                 "sde_type": "sde", "generator": torch.Generator()}  # fmt: skip
    sde_step(**arguments)
    with pytest.raises(ValueError, match=message):
        sde_step(**{**arguments, **change})
