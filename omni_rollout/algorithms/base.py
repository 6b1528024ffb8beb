"""What algorithms are given, what they give back, and the arithmetic they share. Imports no torch: a typo must cost nothing.

*Coupled* algorithms learn from the log-probs of sampled steps: what samples and what scores must agree. *Forward* ones learn
from the final latents alone, which they noise again; how those were sampled is all the same to them.

Shape letters: B rows of one micro-batch, `*shape` whatever a family's latent has. All tensors are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, ClassVar

from omni_rollout.algorithms import rollout_correction
from omni_rollout.config import AlgorithmConfig, OldLogProbs, OnMismatch, RewardNormalise, SDETypeName, TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one micro-batch."""

    loss: torch.Tensor  # [], to differentiate: a mean over the rows
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # detached, any shape; means are logged as `actor/NAME`


@dataclass(frozen=True, kw_only=True)
class Steps:
    """B (trajectory, step) pairs, as a coupled loss gets them. The first three of the second part carry gradients."""

    old_log_probs: torch.Tensor  # [B], of the policy before this step's update, which sampled, but for rollout.ahead=1
    advantages: torch.Tensor  # [B]; rollout correction's weight is in them
    clip_range: float  # trainer.clip_range
    log_probs: torch.Tensor  # [B]
    mean: torch.Tensor  # [B, *shape], of the step
    velocity: torch.Tensor  # [B, *shape]
    sample: torch.Tensor  # [B, *shape], before the step
    prev_sample: torch.Tensor  # [B, *shape], after it
    step_std: torch.Tensor  # [B], sqrt(-dt) is in it
    sigma: torch.Tensor  # [B]
    sigma_next: torch.Tensor  # [B]
    old_mean: torch.Tensor | None = None  # [B, *shape], by the policy before this step's first update; for `recalls`
    kl: torch.Tensor | None = None  # [B], exact Gaussian KL of the step to the reference's, per element


@dataclass(frozen=True, kw_only=True)
class Samples:
    """B times at which final latents were noised again, as a forward loss gets them. `velocity` alone carries gradients."""

    advantages: torch.Tensor  # [B]
    clip_range: float  # trainer.clip_range
    x0: torch.Tensor  # [B, *shape], the final latents
    noise: torch.Tensor  # [B, *shape]
    sigma: torch.Tensor  # [B], of the trajectory's own schedule; the time
    sample: torch.Tensor  # [B, *shape], (1 - sigma) x0 + sigma noise
    velocity: torch.Tensor  # [B, *shape], without guidance
    first_velocity: torch.Tensor | None = None  # by the policy before this step's first update; for `recalls`
    old_velocity: torch.Tensor | None = None  # by the old policy; for `keeps_old`
    reference_velocity: torch.Tensor | None = None  # by the policy the run started from; for `needs_reference`

    @property
    def target(self) -> torch.Tensor:
        """[B, *shape], the velocity of the straight line between x0 and the noise."""
        return self.noise - self.x0


class Algorithm(AlgorithmConfig):
    """Subclass `Coupled` or `Forward`. Annotated fields are keys; what stands as ClassVar says what the update must bring."""

    compares: ClassVar[bool] = True  # images of one prompt with each other: groups of one teach nothing
    needs_advantage: ClassVar[bool] = True  # a row whose advantage is 0 has no gradient but by the KL term, and is left out
    recalls: ClassVar[bool] = False  # what the policy predicted before this step's first update
    keeps_old: ClassVar[bool] = False  # an old policy beside it, see `old_decay`; saved in checkpoints
    samples_with_old: ClassVar[bool] = False  # rollouts are the old policy's
    shares_noise: ClassVar[bool] = False  # members of a group get the same times and the same noise
    rows_together: ClassVar[int] = 1  # of a unit, see `units`

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns of `prompts` with the images to learn from, best first; none: they are sampled."""
        return ()

    def advantages(self, rewards: torch.Tensor, group_ids: Sequence[str]) -> torch.Tensor:
        """[B] fp32: (reward - group mean) / (deviation + advantage_eps), cut to +-advantage_clip.

        A group of one, or of equal rewards, gets exact zeros: it says nothing about which image was better.

        Args:
            rewards: [B], any float dtype.
            group_ids: B; equal ones are compared, in whatever order they come.

        Raises:
            ValueError: a reward that is not finite, or lengths that differ.
        """
        if rewards.shape != (len(group_ids),):
            raise ValueError(f"{list(rewards.shape)} rewards for {len(group_ids)} group ids: expected one reward for each")
        values = rewards.double()
        if not bool(values.isfinite().all()):
            bad = sorted({group for group, ok in zip(group_ids, values.isfinite().tolist(), strict=True) if not ok})
            raise ValueError(f"rewards of group {', '.join(bad)} are not finite: they would make every advantage NaN")
        correction = 1 if self.advantage_deviation == "sample" else 0
        result = values.new_zeros(values.shape)
        for group in dict.fromkeys(group_ids):
            members = [index for index, other in enumerate(group_ids) if other == group]
            own = values[members]
            if bool((own == own[0]).all()):
                continue
            spread = (values if self.advantage_std == "global" else own).std(correction=correction)
            result[members] = (own - own.mean()) / (spread + self.advantage_eps)
        return result.clamp(-self.advantage_clip, self.advantage_clip).float()

    def units(self, advantages: Sequence[float], group_ids: Sequence[str]) -> list[tuple[int, ...]]:
        """Rows that learn together, `rows_together` in one micro-batch, one after the other. Rows in no unit are left out."""
        return [(row,) for row in range(len(advantages))]

    def steps(self, count: int, draw: Random) -> list[int]:
        """Which of a trajectory's steps to learn from: of its T stochastic ones, or of a forward one's N times."""
        return list(range(count))

    def window_start(self, step: int, first: int, last: int, draw: Random) -> int:
        """Where a group's window of stochastic steps begins, from `first` to `last`; `step`: 1, 2, ... of the run."""
        return draw.randint(first, last)

    def old_decay(self, updates: int) -> float:
        """d of old <- d old + (1 - d) policy, after each step; `updates`: the optimizer's steps so far."""
        raise NotImplementedError

    def problems(self, config: TrainConfig) -> Iterator[str]:
        """What is wrong with its keys, or with others as it needs them, found before anything is loaded: a line each."""
        choices = {"advantage_std": ("global", "group"), "advantage_deviation": ("population", "sample")}
        for key, expected in choices.items():
            if getattr(self, key) not in expected:
                yield f"algorithm.{key}={getattr(self, key)}: expected {' or '.join(expected)}"
        if not self.advantage_eps >= 0:
            yield f"algorithm.advantage_eps={self.advantage_eps}: expected 0 or more"
        if self.compares and config.rollout.group_size == 1 and not self.targets:
            yield f"rollout.group_size=1: {self.name} compares the images of one prompt; give 2 or more"


@dataclass
class Coupled(Algorithm):
    """Learns from log-probs. Rollout correction (verl's names): p = exp(old log-prob - the rollout's) of a step."""

    # true: the exact KL, |mean - mean'|^2 / (2 s^2 |dt|); false: without |dt|, as published code has it since 2025-07, so that
    # late steps weigh more: its 0.04 is about 0.004 of the exact one
    kl_with_dt: bool = True
    rollout_is: str | None = None  # token: weigh each step's loss by p; sequence: by the product over its trajectory
    rollout_is_threshold: str = "2.0"  # weights are cut to it; "0.5_2.0": weights outside become 0
    # Leave out steps (token_k1|k2|k3), or whole trajectories (seq_sum_k1|k2|k3, seq_mean_k1|k2|k3, seq_max_k2|k3).
    rollout_rs: str | None = None
    rollout_rs_threshold: str = "2.0"  # of k1: bounds of the ratio, "0.5_2.0" or 2.0 for both; of k2 and k3: an upper bound

    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[B] with gradients, before the KL term; and metrics, see `Loss`."""
        raise NotImplementedError

    def loss(self, steps: Steps) -> Loss:
        """mean(policy_loss) + kl_coef * mean(KL); means are taken in fp64, so they do not depend on the order of rows."""
        values, metrics = self.policy_loss(steps)
        policy = mean(values)
        if steps.kl is None:
            return Loss(loss=policy, metrics=metrics)
        kl = steps.kl if self.kl_with_dt else steps.kl * (steps.sigma - steps.sigma_next)
        return Loss(loss=policy + self.kl_coef * mean(kl), metrics=metrics)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        if config.sampling.sde_type is SDETypeName.ode:
            yield (
                f"sampling.sde_type=ode: draws no noise, so there is nothing that {self.name} could learn from; "
                "give sde, cps or dance_sde"
            )
        if config.sampling.sde_type is SDETypeName.cps and self.kl_coef and not self.kl_with_dt:
            yield "algorithm.kl_with_dt=false with sampling.sde_type=cps: its steps have no dt to leave out; give true"
        yield from rollout_correction.problems(self)
        if (self.rollout_is or self.rollout_rs) and config.trainer.old_log_probs is not OldLogProbs.recompute:
            yield (
                "trainer.old_log_probs=rollout with rollout correction: they are the rollout's own, so every ratio is 1; "
                "give trainer.old_log_probs=recompute"
            )
        yield from super().problems(config)


@dataclass
class Forward(Algorithm):
    """Learns from final latents: they are noised anew, at times of the schedule, and the velocity there is what is trained."""

    needs_advantage: ClassVar[bool] = False

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[B] or [units] with gradients, before the distance to the reference; and metrics, see `Loss`."""
        raise NotImplementedError

    def loss(self, samples: Samples) -> Loss:
        """mean(sample_loss) + kl_coef * mean((velocity - reference's)^2)."""
        values, metrics = self.sample_loss(samples)
        total = mean(values)
        if self.kl_coef and samples.reference_velocity is not None:
            distance = element_means((samples.velocity - samples.reference_velocity) ** 2)
            total = total + self.kl_coef * mean(distance)
            metrics = {**metrics, "reference_distance": distance.detach()}
        return Loss(loss=total, metrics=metrics)

    def problems(self, config: TrainConfig) -> Iterator[str]:
        if config.sampling.sde_type is not SDETypeName.ode:
            yield (
                f"sampling.sde_type={config.sampling.sde_type.value}: {self.name} learns from final latents, which a "
                "trajectory of the ode holds; give sampling.sde_type=ode"
            )
        coupled_only = {
            "trainer.old_log_probs": config.trainer.old_log_probs is OldLogProbs.recompute,
            "monitor.on_mismatch": config.monitor.on_mismatch is not OnMismatch.alert,
            "sampling.sde_window_size": config.sampling.sde_window_size is not None,
        }
        for key, given in coupled_only.items():
            if given:
                yield f"{key}: of no use to {self.name}, which reads no log-probs and draws no noise in steps; leave it out"
        yield from super().problems(config)


@dataclass
class FromData(Forward):
    """Takes images that the policy sampled, or those of a data set: each row of `prompts` is a group."""

    images_a_row: ClassVar[tuple[str, ...]]  # what they are called unless they are named otherwise
    columns: list[str] | None = None  # of `prompts`: paths of images to learn from, best first; None: images are sampled

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.columns or ())

    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if self.columns is None:
            return
        own, given = self.images_a_row, f"algorithm.columns=[{','.join(self.targets)}]"
        wrong = len(self.targets) != len(own) or len(set(self.targets)) < len(own)
        if wrong or {"prompt", "images", "metadata"} & {*self.targets}:
            yield f"{given}: {self.name} learns from {len(own)} of a row; give [{','.join(own)}], or what these are called"
        if config.rollout.group_size != len(own):
            yield f"rollout.group_size={config.rollout.group_size}: with {given}, a row has {len(own)}; give {len(own)}"
        of_no_use = {
            "rollout.ahead": config.rollout.ahead,
            "rollout.url": config.rollout.url,
            "reward.normalise": config.reward.normalise is not RewardNormalise.none,
        }
        for key, found in of_no_use.items():
            if found:
                yield f"{key}: of no use with {given}, where nothing is sampled and no reward is asked; leave it out"


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """[B]: -min(ratio A, clip(ratio, 1 +- clip_range) A), PPO's (arXiv 1707.06347, eq. 7)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -(ratio * advantages).minimum(clipped * advantages)


def outside(ratio: torch.Tensor, clip_range: float) -> torch.Tensor:
    """[B] 0 or 1: whether a ratio lies outside of 1 +- clip_range, whatever the advantage."""
    return ((ratio.detach() - 1).abs() > clip_range).float()


def mean(values: torch.Tensor) -> torch.Tensor:
    """[] fp32, in fp64 on the way."""
    return values.double().mean().float()


def element_means(values: torch.Tensor) -> torch.Tensor:
    """[B, *shape] -> [B] fp32, in fp64 on the way."""
    return values.double().flatten(1).mean(1).float()


def per_row(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...], to multiply [B, *shape] by."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def random_times(count: int, wanted: int, draw: Random) -> list[int]:
    """`wanted` different steps of `count`, or all of them; rising."""
    return sorted(draw.sample(range(count), min(wanted, count)))
