"""How far two sets of log-probs for the same steps lie apart, in numbers that fit a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omni_rollout.types import Trajectory


@dataclass(frozen=True, kw_only=True)
class Measure:
    """With d = rollout log-prob - trainer's log-prob, a mean over the latent's S*C elements; all arithmetic is fp64."""

    log_probs: int  # how many were compared
    kl: float  # mean(d), the k1 estimate, in nats per element; opposite signs cancel in it
    kl_nats: float  # mean(d * S*C): per denoising step
    kl_over_clip: float  # |kl| in units of clip_range
    k3_kl: float  # mean(exp(-d) - 1 + d): never negative
    clip_fraction: float  # share of |exp(-d) - 1| above clip_range
    bitwise_equal_fraction: float
    mean_abs_diff: float
    max_abs_diff: float

    @property
    def exact(self) -> bool:
        """Every log-prob has the same bits, and there was at least one. NaN on both sides is no agreement."""
        return self.log_probs > 0 and self.bitwise_equal_fraction == 1.0 and self.max_abs_diff == 0.0


def measure(trajectories: Sequence[Trajectory], recomputed: Sequence[torch.Tensor], clip_range: float) -> Measure:
    """
    Args:
        recomputed: one [T] fp32 per trajectory, in the same order.
    """
    return _measure(
        torch.cat([trajectory.log_probs for trajectory in trajectories]),
        torch.cat(list(recomputed)),
        torch.cat([torch.full((len(t.log_probs),), t.latents[0].numel()) for t in trajectories]),
        clip_range,
    )


def measure_steps(
    trajectories: Sequence[Trajectory], recomputed: Sequence[torch.Tensor], clip_range: float
) -> dict[int, Measure]:
    """The same for each step index by itself."""
    rows: dict[int, list[tuple[torch.Tensor, torch.Tensor, int]]] = defaultdict(list)
    for trajectory, log_probs in zip(trajectories, recomputed, strict=True):
        for position, step in enumerate(trajectory.step_indices.tolist()):
            rows[step].append((trajectory.log_probs[position], log_probs[position], trajectory.latents[0].numel()))
    return {
        step: _measure(
            torch.stack([row[0] for row in found]),
            torch.stack([row[1] for row in found]),
            torch.tensor([row[2] for row in found]),
            clip_range,
        )
        for step, found in sorted(rows.items())
    }


def _measure(rollout: torch.Tensor, trainer: torch.Tensor, elements: torch.Tensor, clip_range: float) -> Measure:
    if rollout.dtype != torch.float32 or trainer.dtype != torch.float32:
        raise ValueError(f"log-probs are {rollout.dtype} and {trainer.dtype}: expected float32 on both sides")
    difference = rollout.double() - trainer.double()
    size = difference.abs()
    equal = rollout.contiguous().view(torch.int32) == trainer.contiguous().view(torch.int32)
    kl = difference.mean().item()
    return Measure(
        log_probs=len(difference),
        kl=kl,
        kl_nats=(difference * elements).mean().item(),
        kl_over_clip=abs(kl) / clip_range,
        k3_kl=(torch.expm1(-difference) + difference).mean().item(),
        clip_fraction=(torch.expm1(-difference).abs() > clip_range).double().mean().item(),
        bitwise_equal_fraction=equal.double().mean().item(),
        mean_abs_diff=size.mean().item(),
        max_abs_diff=size.max().item() if len(size) else float("nan"),
    )
