"""Metrics as pure functions: name -> number, under the names of the field; ours begin with `parity/`.

B trajectories, T stochastic steps. Log-probs are means over the S*C elements of a latent, so a difference of two is in nats per
element. All arithmetic is fp64, in which the difference of two fp32 numbers of like size is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

PER_TIMESTEP = "rollout_corr/logprob_abs_diff/ts_"


def parity_metrics(
    rollout_log_probs: torch.Tensor,
    log_probs: torch.Tensor,
    step_indices: torch.Tensor,
    elements: int,
    clip_range: float,
) -> dict[str, float]:
    """What the rollout and the trainer say about the same steps under the same weights, before any update.

    With d = rollout_log_probs - log_probs:

    - `parity/ppo_kl_mb0`, `rollout_corr/kl`: mean(d), the k1 estimate of the KL. Differences of both signs cancel in it, so 0
      alone proves nothing: read it with `parity/bitwise_equal_fraction`.
    - `parity/kl_nats`: mean(d) * elements, per denoising step instead of per element.
    - `rollout_corr/k3_kl`: mean(exp(-d) - 1 + d), never negative, 0 only if all agree.
    - `rollout_corr/logprob_abs_diff_mean`, `_max`: of |d|; `rollout_corr/logprob_abs_diff/ts_{t}`: mean |d| of step index t.
    - `parity/over_clip`: max |d| / clip_range; from 1 on, rounding alone clips a sample.
    - `parity/bitwise_equal_fraction`: share of log-probs with the same bits.

    Args:
        rollout_log_probs: [B, T] fp32, by the rollout.
        log_probs: [B, T] fp32, by the trainer.
        step_indices: [B, T] int64.
        elements: S*C.

    Raises:
        ValueError: shapes differ, or a dtype is not float32 (bits of different types cannot be compared).
    """
    _same_shape(rollout_log_probs, log_probs)
    if step_indices.shape != log_probs.shape:
        raise ValueError(f"step_indices {list(step_indices.shape)}: expected {list(log_probs.shape)}, like log_probs")
    for name, tensor in (("rollout_log_probs", rollout_log_probs), ("log_probs", log_probs)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}: expected float32, as the rollout stores and the trainer computes them")
    difference = rollout_log_probs.double() - log_probs.double()
    size = difference.abs()
    kl = difference.mean().item()
    equal_bits = rollout_log_probs.contiguous().view(torch.int32) == log_probs.contiguous().view(torch.int32)
    return {
        "parity/ppo_kl_mb0": kl,
        "parity/kl_nats": kl * elements,
        "parity/over_clip": size.max().item() / clip_range,
        "parity/bitwise_equal_fraction": equal_bits.double().mean().item(),
        "rollout_corr/kl": kl,
        "rollout_corr/k3_kl": (torch.expm1(-difference) + difference).mean().item(),
        "rollout_corr/logprob_abs_diff_mean": size.mean().item(),
        "rollout_corr/logprob_abs_diff_max": size.max().item(),
        **{f"{PER_TIMESTEP}{t}": size[step_indices == t].mean().item() for t in step_indices.unique(sorted=True).tolist()},
    }


def timestep_gaps(metrics: Mapping[str, float]) -> dict[int, float]:
    """Step index -> mean |d| of its log-probs, out of a step's metrics; none where |d| is of two policies (`staleness`)."""
    if metrics.get("staleness"):
        return {}
    return {int(name.removeprefix(PER_TIMESTEP)): value for name, value in metrics.items() if name.startswith(PER_TIMESTEP)}


def weight_metrics(weights: torch.Tensor) -> dict[str, float]:
    """Rollout correction's weights as they are used, under verl's names.

    - `rollout_corr/rollout_is_mean`, `_min`, `_max`.
    - `rollout_corr/rollout_is_eff_sample_size`: mean(w)^2 / mean(w^2), the share of the samples that as many of equal weight
      would be worth; 1 where all weigh the same, 0 where all are 0.

    Args:
        weights: [N] fp32, never negative.
    """
    values = weights.double()
    square = values.square().mean().item()
    return {
        "rollout_corr/rollout_is_mean": values.mean().item(),
        "rollout_corr/rollout_is_min": values.min().item(),
        "rollout_corr/rollout_is_max": values.max().item(),
        "rollout_corr/rollout_is_eff_sample_size": values.mean().item() ** 2 / square if square else 0.0,
    }


def ratio_metrics(log_probs: torch.Tensor, old_log_probs: torch.Tensor, clip_range: float) -> dict[str, float]:
    """How far one update has moved the policy; ratio = exp(log_probs - old_log_probs).

    - `actor/ppo_kl`: mean(old_log_probs - log_probs).
    - `actor/ratio_mean`, `actor/ratio_std`: over all, the latter with N in the denominator.
    - `actor/pg_clipfrac_higher`, `_lower`: share with ratio > 1 + clip_range, and with ratio < 1 - clip_range;
      `actor/pg_clipfrac`: their sum. Whether the loss uses the clipped value also depends on the advantage's sign.

    Args:
        log_probs, old_log_probs: [B, T] or [N] fp32.
    """
    _same_shape(old_log_probs, log_probs)
    change = log_probs.detach().double() - old_log_probs.detach().double()
    excess = torch.expm1(change)  # ratio - 1, without the rounding of the 1
    higher = (excess > clip_range).double().mean().item()
    lower = (excess < -clip_range).double().mean().item()
    return {
        "actor/ppo_kl": -change.mean().item(),
        "actor/ratio_mean": 1 + excess.mean().item(),
        "actor/ratio_std": excess.std(correction=0).item(),
        "actor/pg_clipfrac": higher + lower,
        "actor/pg_clipfrac_higher": higher,
        "actor/pg_clipfrac_lower": lower,
    }


def reward_metrics(
    rewards: Sequence[float] | torch.Tensor,
    group_ids: Sequence[str],
    breakdown: Mapping[str, Sequence[float] | torch.Tensor],
) -> dict[str, float]:
    """Rewards of one step.

    - `critic/rewards/mean`: over all images.
    - `critic/rewards/std`: their standard deviation (N in the denominator).
    - `critic/rewards/std_mean`: standard deviation within a group (N in the denominator), mean over groups.
    - `critic/rewards/zero_std_ratio`: share of groups whose images all got the same reward, which therefore teach nothing.
    - `critic/rewards/{name}/mean`: each reward by itself, before its weight.

    Args:
        rewards: [B], the weighted sums.
        group_ids: [B].
        breakdown: reward name -> [B].

    Raises:
        ValueError: the lengths differ.
    """
    values = torch.as_tensor(rewards, dtype=torch.float64)
    if len(values) != len(group_ids):
        raise ValueError(f"{len(values)} rewards and {len(group_ids)} group ids: expected as many of each")
    members: dict[str, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    groups = [values[indices] for indices in members.values()]
    flat = [bool((group == group[0]).all()) for group in groups]  # not std == 0: a mean of equal numbers may round
    return {
        "critic/rewards/mean": values.mean().item(),
        "critic/rewards/std": values.std(correction=0).item(),
        "critic/rewards/std_mean": sum(group.std(correction=0).item() for group in groups) / len(groups),
        "critic/rewards/zero_std_ratio": sum(flat) / len(flat),
        **{
            f"critic/rewards/{name}/mean": torch.as_tensor(scores, dtype=torch.float64).mean().item()
            for name, scores in breakdown.items()
        },
    }


def _same_shape(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"log-probs of shapes {list(first.shape)} and {list(second.shape)}: expected the same steps on both sides"
        )
