"""Trajectories -> log-probs by the trainer's network. With the exact profile: the rollout's own, bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from omni_rollout.diffusion.machine import differences as machine_differences
from omni_rollout.diffusion.sde import SDEStep, sde_step
from omni_rollout.errors import PinnedKnobError
from omni_rollout.models import family_module
from omni_rollout.models.base import velocity
from omni_rollout.models.base.passes import PassLimit
from omni_rollout.models.base.policy import batch_keys, conditioning, steps_to_learn
from omni_rollout.types import Trajectory


class FingerprintError(ValueError):
    """A trajectory that this trainer cannot score as it was sampled."""


@dataclass(frozen=True)
class Pair:
    """One thing to score: step `index` of those that trajectory `row` can be learned from, see `steps_to_learn`."""

    row: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Scored(SDEStep):
    """Given steps, and what made them."""

    velocity: torch.Tensor  # [B, *shape] fp32
    sample: torch.Tensor  # [B, *shape] fp32, before the step
    sigma: torch.Tensor  # [B] fp32
    sigma_next: torch.Tensor  # [B] fp32


def check_fingerprint(trajectory: Trajectory, expected: Mapping[str, Any]) -> None:
    """Raises FingerprintError naming the first field of `expected` that the trajectory was not sampled with."""
    for name, value in expected.items():
        found = trajectory.fingerprint.get(name)
        if name == "machine":
            different = machine_differences(found or {}, value)
            if different:
                raise FingerprintError(
                    f"trajectory {trajectory.request_id}: sampled on another machine than this trainer's: "
                    f"{', '.join(different)}; its log-probs would not be the policy's"
                )
        elif found != value:
            raise FingerprintError(
                f"trajectory {trajectory.request_id}: sampled with {name}={found!r}, this trainer has {value!r}; "
                "its log-probs would not be the policy's"
            )


def check_machine(there: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises PinnedKnobError, naming what differs, where what machine `there` samples could not be scored bit for bit here."""
    different = machine_differences(there, expected["machine"]) if "machine" in expected else []
    if different:
        raise PinnedKnobError(
            f"the engine and the trainer would not compute the same bits: {', '.join(different)}; give both the same "
            "(threads=N, machines of one kind), or choose parity=fast and watch parity/ppo_kl_mb0"
        )


def stochastic_pairs(trajectories: Sequence[Trajectory]) -> list[Pair]:
    """All stochastic steps of all trajectories."""
    return [Pair(row, index) for row, one in enumerate(trajectories) for index in range(len(one.step_indices))]


def micro_batches(
    trajectories: Sequence[Trajectory], keys: Sequence[Sequence[object]], pairs: Iterable[Pair], limit: PassLimit
) -> Iterator[list[Pair]]:
    """The pairs in batches within `limit` that may share a forward pass; those that may keep their order.

    Args:
        keys: of `batch_keys`.
    """
    grouped: dict[object, list[Pair]] = defaultdict(list)
    for pair in pairs:
        spec = trajectories[pair.row].spec
        grouped[keys[pair.row][pair.index], spec.sde_type, spec.noise_level, spec.log_prob_form].append(pair)
    for together in grouped.values():
        size, rest = limit.holds(trajectories[together[0].row].spec), iter(together)
        while batch := list(islice(rest, size)):
            yield batch


def score(
    network: nn.Module, trajectories: Sequence[Trajectory], pairs: Sequence[Pair], family: str, dtype: torch.dtype
) -> Scored:
    """Scores the given stochastic steps in one forward pass of `network`, with gradients where they are enabled.

    Args:
        network: the policy's transformer, perhaps wrapped by a trainer engine.
        pairs: B steps that may share a forward pass (see `micro_batches`).
    """
    device = device_of(network)
    chosen = [trajectories[pair.row] for pair in pairs]
    spec = chosen[0].spec
    latents = torch.stack([one.latents[pair.index] for one, pair in zip(chosen, pairs, strict=True)]).to(device)
    prev_sample = torch.stack([one.latents[pair.index + 1] for one, pair in zip(chosen, pairs, strict=True)]).to(device)
    steps = [int(one.step_indices[pair.index]) for one, pair in zip(chosen, pairs, strict=True)]
    predicted = predict(network, trajectories, pairs, latents, family, dtype)
    sigma = torch.stack([one.sigmas[step] for one, step in zip(chosen, steps, strict=True)])
    sigma_next = torch.stack([one.sigmas[step + 1] for one, step in zip(chosen, steps, strict=True)])
    step = sde_step(
        predicted,
        latents,
        sigma,
        sigma_next,
        noise_level=spec.noise_level,
        sde_type=spec.sde_type,
        prev_sample=prev_sample,
        log_prob_form=spec.log_prob_form,
    )
    return Scored(**vars(step), velocity=predicted, sample=latents, sigma=sigma.to(device), sigma_next=sigma_next.to(device))


def predict(
    network: nn.Module,
    trajectories: Sequence[Trajectory],
    pairs: Sequence[Pair],
    latents: torch.Tensor,
    family: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[B, *shape] fp32: the velocity at `latents` [B, *shape] at the pairs' times, told what their trajectories were told."""
    chosen = [trajectories[pair.row] for pair in pairs]
    steps = [steps_to_learn(one)[pair.index] for one, pair in zip(chosen, pairs, strict=True)]
    return velocity.velocity(
        partial(family_module(family, "policy").network, network),
        latents,
        torch.stack([one.timesteps[step] for one, step in zip(chosen, steps, strict=True)]).to(latents.device),
        [conditioning(one, latents.device) for one in chosen],
        dtype,
        expert=velocity.expert_at(chosen[0].spec, steps[0]),
    )


def device_of(network: nn.Module) -> torch.device:
    """Where it computes; the parts of its parameters may lie elsewhere."""
    parameter = next(network.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


@torch.no_grad()
def recompute(
    network: nn.Module, trajectories: Sequence[Trajectory], *, family: str, dtype: torch.dtype, micro_batch_size: int
) -> list[torch.Tensor]:
    """The log-probs of every trajectory under `network`: one [T] fp32 tensor each, in the order given."""
    keys = batch_keys(trajectories)
    log_probs = [torch.empty_like(trajectory.log_probs) for trajectory in trajectories]
    for pairs in micro_batches(trajectories, keys, stochastic_pairs(trajectories), PassLimit(micro_batch_size)):
        for pair, log_prob in zip(pairs, score(network, trajectories, pairs, family, dtype).log_prob.cpu(), strict=True):
            log_probs[pair.row][pair.index] = log_prob
    return log_probs
