"""Trajectories -> log-probs by the trainer's network. With the exact profile: the rollout's own, bit for bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from omni_rollout.models.base.policy import batch_keys, conditioning
from omni_rollout.types import Trajectory


class FingerprintError(ValueError):
    """A trajectory that this trainer cannot score as it was sampled."""


@dataclass(frozen=True)
class Pair:
    """One thing to score: step `index` (0 to T-1) of trajectory `row`."""

    row: int
    index: int


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


def micro_batches(
    trajectories: Sequence[Trajectory], keys: Sequence[Sequence[object]], rows: Sequence[int], size: int
) -> Iterator[list[Pair]]:
    """All stochastic steps of the trajectories in `rows`, in batches of at most `size` that may share a forward pass.

    Args:
        keys: of `batch_keys`.
    """
    grouped: dict[object, list[Pair]] = defaultdict(list)
    for row in rows:
        trajectory = trajectories[row]
        spec = trajectory.spec
        for index in range(len(trajectory.step_indices)):
            grouped[keys[row][index], spec.sde_type, spec.noise_level, spec.log_prob_form].append(Pair(row, index))
    for pairs in grouped.values():
        rest = iter(pairs)
        while batch := list(islice(rest, size)):
            yield batch


def score(
    network: nn.Module, trajectories: Sequence[Trajectory], pairs: Sequence[Pair], family: str, dtype: torch.dtype
) -> SDEStep:
    """Scores the given steps in one forward pass of `network`, with gradients where they are enabled.

    Args:
        network: the policy's transformer, perhaps wrapped by a trainer engine.
        pairs: B steps that may share a forward pass (see `micro_batches`).
    """
    forward = partial(family_module(family, "policy").network, network)
    device = _device(network)
    chosen = [trajectories[pair.row] for pair in pairs]
    spec = chosen[0].spec

    def stack(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(rows).to(device)

    steps = [int(trajectory.step_indices[pair.index]) for trajectory, pair in zip(chosen, pairs, strict=True)]
    latents = stack([trajectory.latents[pair.index] for trajectory, pair in zip(chosen, pairs, strict=True)])
    prev_sample = stack([trajectory.latents[pair.index + 1] for trajectory, pair in zip(chosen, pairs, strict=True)])
    predicted = velocity.velocity(
        forward,
        latents,
        stack([trajectory.timesteps[step] for trajectory, step in zip(chosen, steps, strict=True)]),
        [conditioning(trajectory, device) for trajectory in chosen],
        dtype,
        expert=velocity.expert_at(spec, steps[0]),
    )
    return sde_step(
        predicted,
        latents,
        torch.stack([trajectory.sigmas[step] for trajectory, step in zip(chosen, steps, strict=True)]),
        torch.stack([trajectory.sigmas[step + 1] for trajectory, step in zip(chosen, steps, strict=True)]),
        noise_level=spec.noise_level,
        sde_type=spec.sde_type,
        prev_sample=prev_sample,
        log_prob_form=spec.log_prob_form,
    )


def _device(network: nn.Module) -> torch.device:
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
    for pairs in micro_batches(trajectories, keys, range(len(trajectories)), micro_batch_size):
        for pair, log_prob in zip(pairs, score(network, trajectories, pairs, family, dtype).log_prob.cpu(), strict=True):
            log_probs[pair.row][pair.index] = log_prob
    return log_probs
