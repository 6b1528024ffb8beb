"""Each algorithm's formula against arithmetic of its own (numpy, fp64, from the paper), its gradient, keys and choices."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_rollout.algorithms import algorithm_class, get_algorithm, names, rollout_correction, source_name
from omni_rollout.algorithms.awm import AWM
from omni_rollout.algorithms.base import Coupled, Forward, Samples, Steps
from omni_rollout.algorithms.dance_grpo import DanceGRPO
from omni_rollout.algorithms.diffusion_dpo import DiffusionDPO
from omni_rollout.algorithms.diffusion_nft import DiffusionNFT
from omni_rollout.algorithms.flow_cps import FlowCPS
from omni_rollout.algorithms.flow_dppo import FlowDPPO
from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.algorithms.flow_grpo_fast import FlowGRPOFast
from omni_rollout.algorithms.grpo_guard import GRPOGuard
from omni_rollout.algorithms.mix_grpo import MixGRPO
from omni_rollout.algorithms.sft import SFT
from omni_rollout.config import AlgorithmConfig
from omni_rollout.diffusion.sde import gaussian_kl, sde_step, step_coefficients
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.monitor.suggested import train_command

SHAPE = (5, 3)
ALL = [algorithm_class(name)() for name in names()]
COUPLED = (FlowGRPO, FlowGRPOFast, FlowCPS, MixGRPO, DanceGRPO, GRPOGuard, FlowDPPO)
CLIP = 0.02


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def means(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(1)


def as64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@dataclasses.dataclass
class Step:
    """Real steps, scored under a policy that has moved from the one that sampled by `moved`."""

    steps: Steps
    velocity: torch.Tensor  # the leaf that gradients go to


def a_step(moved: float, sde_type: Any = "sde", rows: int = 6, seed: int = 0, reference: float = 0.0) -> Step:
    sigma = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.3, 0.2])[:rows]
    sigma_next = sigma - 0.1
    sample, old_velocity = normal(rows, *SHAPE, seed=seed), normal(rows, *SHAPE, seed=seed + 1)
    level: dict[str, Any] = {"noise_level": 0.7, "sde_type": sde_type}
    form: Any = "unnormalised" if sde_type == "cps" else "gaussian"
    old = sde_step(old_velocity, sample, sigma, sigma_next, generator=torch.Generator().manual_seed(seed + 2), **level)
    velocity = (old_velocity + moved * normal(rows, *SHAPE, seed=seed + 3)).requires_grad_()

    def scored(v: torch.Tensor) -> Any:
        return sde_step(v, sample, sigma, sigma_next, prev_sample=old.prev_sample, log_prob_form=form, **level)

    new, before = scored(velocity), scored(old_velocity)
    other = scored(old_velocity + reference)
    steps = Steps(
        old_log_probs=before.log_prob,
        advantages=normal(rows, seed=seed + 4),
        clip_range=CLIP,
        log_probs=new.log_prob,
        mean=new.mean,
        velocity=velocity,
        sample=sample,
        prev_sample=old.prev_sample,
        step_std=new.step_std,
        sigma=sigma,
        sigma_next=sigma_next,
        old_mean=before.mean,
        kl=gaussian_kl(new.mean, other.mean, new.step_std) if reference else None,
    )
    return Step(steps, velocity)


def noise_of(steps: Steps, level: float = 0.7) -> np.ndarray:
    """[B]: Flow-SDE's s, without sqrt(dt)."""
    return level * np.sqrt(as64(steps.sigma) / (1 - as64(steps.sigma)))


def by_hand(algorithm: Coupled, steps: Steps, velocity: np.ndarray) -> np.ndarray:
    """[B] losses, from the velocity alone, with the paper's mean and density of Flow-SDE."""
    x, after, sigma = (as64(tensor) for tensor in (steps.sample, steps.prev_sample, steps.sigma))
    delta, s = sigma - as64(steps.sigma_next), noise_of(steps)

    def column(values: np.ndarray) -> np.ndarray:
        return values[:, None, None]

    mean = x * column(1 - s**2 * delta / (2 * sigma)) - velocity * column((1 + s**2 * (1 - sigma) / (2 * sigma)) * delta)
    deviation = s * np.sqrt(delta)
    log_prob = means(
        -((after - mean) ** 2) / column(2 * deviation**2) - column(np.log(deviation)) - 0.5 * math.log(2 * math.pi)
    )
    difference, advantage = log_prob - as64(steps.old_log_probs), as64(steps.advantages)
    assert steps.old_mean is not None
    drift = means((mean - as64(steps.old_mean)) ** 2) / (2 * deviation**2)
    if isinstance(algorithm, GRPOGuard):  # the published difference, which the closed form must equal
        ratio = np.exp(deviation * (difference + drift))
        return np.maximum(-ratio * advantage, -np.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage) / delta
    ratio = np.exp(difference)
    if isinstance(algorithm, FlowDPPO):
        drop = (drift >= algorithm.divergence_limit) & (((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0)))
        return -ratio * advantage * ~drop
    return np.maximum(-ratio * advantage, -np.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)


@pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard, FlowDPPO])
@pytest.mark.parametrize("moved", [0.0, 0.01, 0.3])
def test_coupled_losses_are_the_papers(kind: type[Coupled], moved: float) -> None:
    algorithm = kind(divergence_limit=2e-3) if kind is FlowDPPO else kind()  # type: ignore[call-arg]
    step = a_step(moved)
    expected = by_hand(algorithm, step.steps, as64(step.velocity)).mean()
    assert float(algorithm.loss(step.steps).loss.detach()) == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard, FlowDPPO])
def test_coupled_gradients_are_those_of_the_plain_formula(kind: type[Coupled]) -> None:
    """Central differences of the formula above, in fp64, at a policy that has moved; no row is near its edge."""
    algorithm = kind(divergence_limit=2e-3) if kind is FlowDPPO else kind()  # type: ignore[call-arg]
    step = a_step(0.1)
    algorithm.loss(step.steps).loss.backward()
    at, found, width = as64(step.velocity), step.velocity.grad, 1e-5
    assert found is not None and float(found.abs().max()) > 0
    for place in [(0, 0, 0), (1, 4, 2), (2, 2, 1), (3, 1, 0), (4, 3, 2), (5, 0, 1)]:
        up, down = at.copy(), at.copy()
        up[place] += width
        down[place] -= width
        slope = (by_hand(algorithm, step.steps, up).mean() - by_hand(algorithm, step.steps, down).mean()) / (2 * width)
        assert float(found[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6), place


@pytest.mark.parametrize("kind", COUPLED)
def test_at_the_policy_that_sampled_the_ratio_is_one_and_the_gradient_is_minus_a_grad_log_prob(kind: type[Coupled]) -> None:
    step = a_step(0.0, sde_type="cps" if kind is FlowCPS else "sde")
    found = kind().loss(step.steps)
    weight = step.steps.advantages
    if kind is GRPOGuard:  # its ratio's logarithm is s times Flow-GRPO's there, and the loss is over |dt|
        scale = 1 / (step.steps.sigma - step.steps.sigma_next)
        assert float(found.metrics["guard_ratio_mean"].max()) == float(found.metrics["guard_ratio_mean"].min()) == 1.0
        assert not found.metrics["guard_clipfrac"].any()
        weight = weight * scale * step.steps.step_std
    else:
        scale = torch.ones(6)
    assert float(found.loss.detach()) == pytest.approx(float(-(step.steps.advantages * scale).mean()), rel=1e-6)
    (gradient,) = torch.autograd.grad(found.loss, step.velocity, retain_graph=True)
    (expected,) = torch.autograd.grad(-(weight * step.steps.log_probs).mean(), step.velocity)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), moved=st.floats(1e-3, 0.5))
def test_guards_closed_form_is_the_published_difference(seed: int, moved: float) -> None:
    steps = a_step(moved, seed=seed).steps
    s, drift = as64(steps.step_std), means((as64(steps.mean) - as64(steps.old_mean)) ** 2)  # type: ignore[arg-type]
    published = np.exp(s * (as64(steps.log_probs) - as64(steps.old_log_probs) + drift / (2 * s**2)))
    closed = as64(GRPOGuard().loss(steps).metrics["guard_ratio_mean"])
    # 1e-6, and what fp32 log-probs of size 1 leave of it after the cancellation.
    np.testing.assert_allclose(closed, published, rtol=1e-6, atol=1e-6 + 3e-7 * np.abs(as64(steps.log_probs)).max())


@given(sigma=st.floats(0.05, 0.99), share=st.floats(0.05, 0.95), eta=st.floats(0.05, 1.5))
def test_flow_sde_whose_noise_is_eta_is_dance_grpos(sigma: float, share: float, eta: float) -> None:
    level = eta / math.sqrt(sigma / (1 - sigma))
    flow, dance = (
        step_coefficients(sigma, sigma * share, level, "sde"),
        step_coefficients(sigma, sigma * share, eta, "dance_sde"),
    )
    assert flow == pytest.approx(dance, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("with_dt", [True, False])
def test_both_forms_of_the_kl(with_dt: bool) -> None:
    step = a_step(0.0, reference=0.1)
    plain = FlowGRPO().policy_loss(step.steps)[0].double().mean()
    delta, s = as64(step.steps.sigma - step.steps.sigma_next), noise_of(step.steps)
    sigma = as64(step.steps.sigma)
    apart = 0.1 * (1 + s**2 * (1 - sigma) / (2 * sigma)) * delta  # of the two means, everywhere
    kl = apart**2 / (2 * s**2 * (delta if with_dt else 1.0))
    found = FlowGRPO(kl_coef=0.5, kl_with_dt=with_dt).loss(step.steps).loss
    assert float(found.detach() - plain) == pytest.approx(0.5 * kl.mean(), rel=1e-4, abs=1e-7)


def test_cps_ratio_is_the_normalised_one_to_the_power_of_two_s_squared() -> None:
    step = a_step(0.05, sde_type="cps").steps
    plain = as64(step.log_probs - step.old_log_probs)
    normalised = means((as64(step.prev_sample) - as64(step.old_mean)) ** 2 - (as64(step.prev_sample) - as64(step.mean)) ** 2)  # type: ignore[arg-type]
    normalised = normalised / (2 * as64(step.step_std) ** 2)
    np.testing.assert_allclose(plain, 2 * as64(step.step_std) ** 2 * normalised, rtol=1e-3, atol=1e-6)


# Forward algorithms


def some_samples(seed: int = 0, rows: int = 6, at_old: bool = False) -> Samples:
    x0, noise = normal(rows, *SHAPE, seed=seed), normal(rows, *SHAPE, seed=seed + 1)
    sigma = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])[:rows]
    share = sigma[:, None, None]
    old = normal(rows, *SHAPE, seed=seed + 2)
    velocity = old.clone() if at_old else old + 0.2 * normal(rows, *SHAPE, seed=seed + 3)
    return Samples(
        advantages=3 * normal(rows, seed=seed + 4),
        clip_range=CLIP,
        x0=x0,
        noise=noise,
        sigma=sigma,
        sample=(1 - share) * x0 + share * noise,
        velocity=velocity.requires_grad_(),
        first_velocity=old + 0.21 * normal(rows, *SHAPE, seed=seed + 3),
        old_velocity=old,
        reference_velocity=normal(rows, *SHAPE, seed=seed + 5),
    )


def nft(v: np.ndarray, given_: Samples, algorithm: DiffusionNFT, weights_at: np.ndarray) -> float:
    """As the published code; `weights_at`: the velocity whose gaps the weights are taken from, for they have no gradient."""
    x0, xt, old = as64(given_.x0), as64(given_.sample), as64(given_.old_velocity)  # type: ignore[arg-type]
    t, beta, clip = as64(given_.sigma)[:, None, None], algorithm.mix_beta, algorithm.advantage_clip
    r = np.clip(as64(given_.advantages) / (2 * clip) + 0.5, 0, 1)

    def gap(velocity: np.ndarray, sign: int) -> np.ndarray:
        mixed = beta * velocity + (1 - beta) * old if sign > 0 else (1 + beta) * old - beta * velocity
        return xt - t * mixed - x0

    terms = [
        share * means(gap(v, sign) ** 2) / np.maximum(means(np.abs(gap(weights_at, sign))), 1e-5)
        for sign, share in ((1, r), (-1, 1 - r))
    ]
    distance = means((v - as64(given_.reference_velocity)) ** 2)  # type: ignore[arg-type]
    return float(np.mean(clip * (terms[0] + terms[1]) / beta) + algorithm.kl_coef * distance.mean())


def awm(v: np.ndarray, given_: Samples, algorithm: AWM, _: np.ndarray) -> float:
    target = as64(given_.noise) - as64(given_.x0)

    def log_prob(velocity: np.ndarray) -> np.ndarray:
        error = means((velocity - target) ** 2)
        return -((error + 1e-10) ** 0.25 - 1e-10**0.25) * as64(given_.sigma) / 0.25

    ratio = np.exp(log_prob(v) - log_prob(as64(given_.first_velocity)))  # type: ignore[arg-type]
    a = as64(given_.advantages) / 5
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - CLIP, 1 + CLIP))
    reference, old = (means((v - as64(other)) ** 2) for other in (given_.reference_velocity, given_.old_velocity))  # type: ignore[arg-type]
    return float((policy + algorithm.kl_coef * reference + algorithm.old_coef * old).mean())


def dpo(v: np.ndarray, given_: Samples, algorithm: DiffusionDPO, _: np.ndarray) -> float:
    target = as64(given_.noise) - as64(given_.x0)
    gain = means((v - target) ** 2) - means((as64(given_.reference_velocity) - target) ** 2)  # type: ignore[arg-type]
    losses = [
        -math.log(1 / (1 + math.exp(algorithm.dpo_beta / 2 * (winner - loser))))
        for winner, loser in zip(gain[::2], gain[1::2], strict=True)
    ]
    return float(np.mean(losses))


def sft(v: np.ndarray, given_: Samples, algorithm: SFT, _: np.ndarray) -> float:
    distance = means((v - as64(given_.reference_velocity)) ** 2)  # type: ignore[arg-type]
    return float(means((v - (as64(given_.noise) - as64(given_.x0))) ** 2).mean() + algorithm.kl_coef * distance.mean())


FORWARD: list[tuple[Forward, Callable[..., float]]] = [
    (DiffusionNFT(), nft),
    (DiffusionNFT(mix_beta=0.1, kl_coef=0.3), nft),
    (AWM(), awm),
    (AWM(kl_coef=0.0, old_coef=0.5), awm),
    (DiffusionDPO(dpo_beta=3.0), dpo),
    (SFT(kl_coef=0.2), sft),
]


@pytest.mark.parametrize(("algorithm", "formula"), FORWARD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("seed", [0, 7])
def test_forward_losses_and_gradients_are_the_papers(algorithm: Forward, formula: Callable[..., float], seed: int) -> None:
    samples = some_samples(seed)
    found = algorithm.loss(samples).loss
    at = as64(samples.velocity)
    assert float(found.detach()) == pytest.approx(formula(at, samples, algorithm, at), rel=2e-6, abs=1e-6)
    (gradient,) = torch.autograd.grad(found, samples.velocity)
    for place in [(0, 0, 0), (1, 4, 2), (2, 2, 1), (3, 1, 0), (4, 3, 2), (5, 0, 1)]:
        up, down = at.copy(), at.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = (formula(up, samples, algorithm, at) - formula(down, samples, algorithm, at)) / 2e-5
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6), place


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.1, 0.5, 1.0]))
def test_at_the_old_policy_nfts_gradient_is_along_two_r_minus_one(seed: int, beta: float) -> None:
    samples = some_samples(seed, at_old=True)
    loss = DiffusionNFT(mix_beta=beta, kl_coef=0.0).loss(samples).loss
    (gradient,) = torch.autograd.grad(loss, samples.velocity)
    gap = samples.sample - samples.sigma[:, None, None] * samples.velocity.detach() - samples.x0
    weight = gap.abs().flatten(1).mean(1).clamp(min=1e-5)
    r = (samples.advantages / 10 + 0.5).clamp(0, 1)
    scale = -(1 - 2 * r) * 5 * 2 * samples.sigma / weight / (len(r) * gap[0].numel())  # no beta left in it
    torch.testing.assert_close(gradient, -scale[:, None, None] * gap, rtol=1e-3, atol=1e-7)


def test_awm_at_the_policy_that_sampled_is_a_policy_gradient() -> None:
    samples = some_samples()
    on_policy = dataclasses.replace(samples, first_velocity=samples.velocity.detach())
    found = AWM(kl_coef=0.0, old_coef=0.0).loss(on_policy)
    assert float(found.loss.detach()) == pytest.approx(float(-samples.advantages.mean() / 5), rel=1e-6)
    assert not found.metrics["awm_clipfrac"].any()


# Choices


def test_old_policies_follow_as_published() -> None:
    steps = (0, 1, 75, 76, 500, 10_000)
    assert [DiffusionNFT(old_decay_type=0).old_decay(k) for k in steps] == [0.0] * 6
    assert [DiffusionNFT(old_decay_type=1).old_decay(k) for k in steps] == pytest.approx([0, 0.001, 0.075, 0.076, 0.5, 0.5])
    assert [DiffusionNFT(old_decay_type=2).old_decay(k) for k in steps] == pytest.approx([0, 0, 0, 0.0075, 0.999, 0.999])
    assert [AWM().old_decay(k) for k in steps] == pytest.approx([0, 0.001, 0.075, 0.076, 0.3, 0.3])


def test_windows_of_mix_grpo() -> None:
    draw = random.Random(0)

    def starts(**keys: Any) -> list[int]:
        return [MixGRPO(**keys).window_start(step, 1, 4, draw) for step in range(1, 11)]

    assert starts(window_every=2) == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]
    assert starts(window_every=3, window_stride=3) == [1, 1, 1, 4, 4, 4, 3, 3, 3, 2]
    assert starts(window_every=1, window_stride=0) == starts(window="fixed") == [1] * 10
    drawn = starts(window="random")
    assert drawn == starts(window="random") != starts(window="random", window_seed=1) and set(drawn) <= {1, 2, 3, 4}
    assert len(set(drawn)) > 1


@given(count=st.integers(1, 50), seed=st.integers(0, 999))
def test_steps_that_are_learned_from(count: int, seed: int) -> None:
    for algorithm in ALL:
        steps = algorithm.steps(count, random.Random(seed))
        assert steps == algorithm.steps(count, random.Random(seed)), "the same for the same draw"
        assert steps == sorted(set(steps)) and set(steps) <= set(range(max(count, 2)))
    if count > 1:
        assert len(DanceGRPO().steps(count, random.Random(seed))) == max(1, int(0.6 * count))
        assert DiffusionNFT().steps(count, random.Random(seed)) == list(range(int(0.99 * count) or 1))
        assert 0 not in AWM().steps(count, random.Random(seed)) and max(AWM().steps(count, random.Random(0))) < max(
            2, 0.9 * count
        )


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.floats(-3, 3)), min_size=1, max_size=20))
def test_units_are_the_best_and_the_worst_of_a_group(rows: list[tuple[str, float]]) -> None:
    groups, advantages = [group for group, _ in rows], [advantage for _, advantage in rows]
    pairs = DiffusionDPO().units(advantages, groups)
    for best, worst in pairs:
        own = [value for group, value in rows if group == groups[best]]
        assert groups[best] == groups[worst] and advantages[best] == max(own) > advantages[worst] == min(own)
    differing = {group for group in groups if len({value for other, value in rows if other == group}) > 1}
    assert {groups[best] for best, _ in pairs} == differing and len(pairs) == len(differing)
    for (row,) in SFT(best=2).units(advantages, groups):
        above = [value for group, value in rows if group == groups[row] and value > advantages[row]]
        assert advantages[row] > 0 and len(above) < 2
    assert FlowGRPO().units(advantages, groups) == [(row,) for row in range(len(rows))]


@pytest.mark.parametrize(("deviation", "correction"), [("population", 0), ("sample", 1)])
@pytest.mark.parametrize("std", ["global", "group"])
def test_deviations(std: str, deviation: str, correction: int) -> None:
    rewards, groups = [0.1, 0.5, 0.9, 0.2, 0.3], ["a", "a", "a", "b", "b"]
    algorithm = FlowGRPO(advantage_std=std, advantage_deviation=deviation, advantage_eps=1e-3)
    found = algorithm.advantages(torch.tensor(rewards), groups).tolist()
    for index, group in enumerate(groups):
        own = [reward for reward, other in zip(rewards, groups, strict=True) if other == group]
        spread = np.std(rewards if std == "global" else own, ddof=correction)
        assert found[index] == pytest.approx((rewards[index] - np.mean(own)) / (spread + 1e-3), rel=1e-5, abs=1e-6)


def test_defaults_are_the_papers() -> None:
    for kind in (DanceGRPO, MixGRPO):
        assert (kind().advantage_std, kind().advantage_deviation, kind().advantage_eps) == ("group", "sample", 1e-8)
    assert GRPOGuard().advantage_std == "group" and FlowGRPO().advantage_std == DiffusionNFT().advantage_std == "global"
    clips = {"flow_grpo_fast": 1e-5, "mix_grpo": 1e-4, "dance_grpo": 1e-4, "grpo_guard": 2e-6, "awm": 1.0}
    for name in names():
        config = compose(["model=nano", "prompts=p.txt", f"algorithm={name}"])
        assert type(config.algorithm) is algorithm_class(name) and config.algorithm.name == name
        assert config.trainer.clip_range == clips.get(name, 1e-3)
        forward = isinstance(config.algorithm, Forward)
        assert (config.sampling.sde_type.value == "ode") == forward
        assert get_algorithm(config.algorithm) is config.algorithm


# Rollout correction


@settings(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6),
    level=st.sampled_from([None, "token", "sequence"]),
    threshold=st.sampled_from(["2.0", "0.5_2.0"]),
    rejection=st.sampled_from([None, *rollout_correction.REJECTIONS]),
    bound=st.sampled_from(["2.0", "1.1"]),
)
@example(gaps=[0.0, 2.0, 0.0, 0.0], level=None, threshold="2.0", rejection="token_k2", bound="2.0")  # at the bound
def test_rollout_correction_is_verls(gaps: list[float], level: str, threshold: str, rejection: str, bound: str) -> None:
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    rollout = torch.linspace(-1, 1, len(gaps))
    old, mask = rollout + torch.tensor(gaps), torch.ones(1, len(gaps))
    keys = FlowGRPO(
        rollout_is=level, rollout_is_threshold=threshold, rollout_rs=rejection, rollout_rs_threshold=bound
    )  # fmt: skip
    log_ratio = (old.double() - rollout.double())[None]  # rounded to fp32 it may lie on the other side of a bound
    weights, kept = rollout_correction.weights(keys, rollout, old), rollout_correction.kept(keys, rollout, old)
    if level is None:
        assert torch.equal(weights, torch.ones(len(gaps)))
    elif weights.any():  # verl 0.9.1 divides by the sum of all
        theirs, _ = helper.compute_rollout_correction_weights(log_ratio, mask, level, threshold)
        torch.testing.assert_close(weights, theirs[0].float(), rtol=1e-5, atol=1e-6)
    if rejection is None:
        assert kept == [True] * len(gaps)
    else:
        left, _ = helper.compute_rollout_rejection_mask(log_ratio, mask, rejection, bound)
        assert kept == left[0].bool().tolist()


# Names, keys and sources


def test_algorithms_are_found_by_name() -> None:
    assert {"flow_grpo", "awm", "sft"} < set(names()) and len(names()) >= 11 and "base" not in names()
    assert algorithm_class("flow_grpo") is FlowGRPO
    assert get_algorithm(AlgorithmConfig(kl_coef=0.5)) == FlowGRPO(kl_coef=0.5)
    with pytest.raises(UserError, match=r"algorithm.name=flow_gpro: did you mean flow_grpo\? expected one of awm, "):
        algorithm_class("flow_gpro")
    for name in ("base", "rollout_correction", "..policy.lora"):
        with pytest.raises(UserError, match="expected one of"):
            algorithm_class(name)


def composed(*overrides: str) -> Any:
    return compose(["model=nano", "prompts=p.txt", *overrides]).algorithm


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=awn"], r"algorithm=awn: no such choice; did you mean algorithm=awm\?"),
        (["algorithm.name=awn"], r"algorithm.name=awn: did you mean awm\?"),
        (
            ["algorithm.kl_coeff=1"],
            r"algorithm.kl_coeff: flow_grpo has no such key; did you mean algorithm.kl_coef\? it has name",
        ),
        (["algorithm=awm", "algorithm.mix_beta=1"], "algorithm.mix_beta: awm has no such key; it has name"),
        (["algorithm.clip_range=1"], r"algorithm.clip_range: flow_grpo has no such key; did you mean trainer.clip_range\?"),
        (["algorithm=awm", "algorithm.times=often"], "algorithm.times=often: .*often"),
        (["algorithm.kl_coef=much"], "algorithm.kl_coef=much: expected a number"),
        (["algorithm.source=nowhere.py"], "algorithm.source=.*nowhere.py: cannot be imported, FileNotFoundError"),
        (["algorithm.source=3"], "algorithm.source=3: cannot be imported, ModuleNotFoundError"),
        (["algorithm.source=nowhere"], "algorithm.source=nowhere: cannot be imported, ModuleNotFoundError"),
        (["algorithm.source=json"], "algorithm.source=json: expected one class that subclasses Coupled or Forward, found none"),
        (["algorithm.source=json:loads"], "algorithm.source=json:loads: json has no class loads that is an algorithm"),
    ],
)
def test_a_wrong_name_or_key_is_answered_with_the_nearest(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.sde_type=ode"], "draws no noise, so there is nothing that flow_grpo could learn from"),
        (["algorithm=awm", "sampling.sde_type=sde"], "sampling.sde_type=sde: awm learns from final latents"),
        (["algorithm=awm", "trainer.old_log_probs=recompute"], "trainer.old_log_probs: of no use to awm"),
        (["algorithm=sft", "monitor.on_mismatch=stop"], "monitor.on_mismatch: of no use to sft"),
        (["algorithm=sft", "sampling.sde_window_size=2"], "sampling.sde_window_size: of no use to sft"),
        (["algorithm=flow_cps", "sampling.sde_type=sde"], "flow_cps learns from cps steps"),
        (["algorithm=dance_grpo", "sampling.sde_type=sde"], "dance_grpo learns from steps of constant noise"),
        (["algorithm=grpo_guard", "sampling.sde_type=cps"], "grpo_guard is made for sampling.sde_type=sde"),
        (["algorithm=mix_grpo", "algorithm.window=sliding"], "algorithm.window=sliding: expected one of progressive"),
        (["algorithm=mix_grpo", "sampling.sde_window_size=null"], "mix_grpo moves a window; give its size"),
        (["algorithm=diffusion_nft", "algorithm.old_decay_type=3"], "old_decay_type=3: expected 0, 1 or 2"),
        (["algorithm=diffusion_dpo", "trainer.micro_batch_size=1"], "diffusion_dpo scores pairs; give 2 or more"),
        (["algorithm=diffusion_dpo", "rollout.group_size=1"], "diffusion_dpo compares the images of one prompt"),
        (["algorithm=flow_dppo", "algorithm.divergence_limit=0"], "divergence_limit=0.0: expected more than 0"),
        (["algorithm.advantage_deviation=robust"], "advantage_deviation=robust: expected population or sample"),
        (["algorithm.kl_coef=1", "algorithm.kl_with_dt=false", "sampling.sde_type=cps"], "kl_with_dt=false with"),
        (["algorithm.rollout_is=token"], "trainer.old_log_probs=rollout with rollout correction"),
        (["algorithm.rollout_is=word"], "algorithm.rollout_is=word: expected null, or one of token, sequence"),
        (["algorithm.rollout_rs=token_k3", 'algorithm.rollout_rs_threshold="0.5_2.0"'], "0.5_2.0: expected one number"),
        (["algorithm.rollout_is=token", "algorithm.rollout_is_threshold=-1"], "threshold=-1: expected a number above 0"),
    ],
)  # fmt: skip
def test_validate_asks_the_algorithm(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(compose(["experiment=nano_ocr", *overrides]))


OWN = """
import torch

from omni_rollout.algorithms.base import Coupled, Steps


class Squared(Coupled):
    temperature: float = 2.0

    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -steps.advantages * (steps.log_probs - steps.old_log_probs) / self.temperature, {}
"""


def test_an_algorithm_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squared.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = composed("algorithm.source=squared.py", "algorithm.temperature=4")
    assert (own.name, own.temperature, own.kl_coef, type(own).__name__) == ("squared", 4.0, 0.0, "Squared")
    monkeypatch.chdir("/")  # a worker process may stand elsewhere
    again = algorithm_class(own.name, own.source)(**dataclasses.asdict(own))
    steps = a_step(0.1).steps
    expected = -(steps.advantages * (steps.log_probs - steps.old_log_probs)).mean() / 4
    torch.testing.assert_close(again.loss(steps).loss, expected)  # type: ignore[attr-defined]
    (tmp_path / "ending.py").write_text("import sys\nsys.exit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match=r"ending\.py: cannot be imported, SystemExit: 7"):
        composed("algorithm.source=ending.py")
    assert composed("algorithm.source=squared").name == composed("algorithm.source=squared:Squared").name == "squared"
    with pytest.raises(UserError, match=r"squared has no such key; did you mean algorithm\.temperature"):
        composed("algorithm.source=squared", "algorithm.temperatur=1")


@pytest.mark.parametrize(
    ("source", "name"), [("a/b/mine.py", "mine"), ("mine.py:Best", "mine"), ("package.mine", "mine"), ("mine:Best", "mine")]
)
def test_the_name_of_a_source(source: str, name: str) -> None:
    assert source_name(source) == name


def test_a_file_may_import_what_lies_beside_it_and_is_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("WARMTH = 4.0\n")
    (tmp_path / "mine.py").write_text("from beside_it import WARMTH\n" + OWN)
    source = f"algorithm.source={tmp_path / 'mine.py'}"
    assert type(composed(source)) is type(composed(source, "algorithm.temperature=3"))


def test_an_entry_point_is_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squared.py").write_text(OWN)
    (tmp_path / "squared-1.dist-info").mkdir()
    (tmp_path / "squared-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: squared\nVersion: 1\n")
    (tmp_path / "squared-1.dist-info" / "entry_points.txt").write_text(
        "[omni_rollout.algorithms]\nsquare_root = squared:Squared\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "square_root" in names()
    assert composed("algorithm=square_root", "algorithm.temperature=3").temperature == 3.0


def test_the_command_that_repeats_a_run_gives_what_differs_from_the_algorithms_own_defaults() -> None:
    config = compose(["model=nano", "prompts=p.txt", "algorithm=dance_grpo", "algorithm.advantage_std=global"])
    command = train_command(config)
    assert "algorithm.name=dance_grpo" in command and "algorithm.advantage_std=global" in command
    assert "advantage_deviation" not in command and "timestep_fraction" not in command
