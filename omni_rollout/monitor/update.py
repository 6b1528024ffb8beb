"""Metrics of one update, from what it scored."""

from __future__ import annotations

import math
import statistics

import torch

from omni_rollout.monitor.metrics import parity_metrics, ratio_metrics, weight_metrics
from omni_rollout.policy.update import Update


def update_metrics(update: Update, *, elements: int, clip_range: float) -> dict[str, float]:
    """Metrics of one update: parity before its first optimizer step, ratios over all of it, where log-probs were scored."""
    return {
        **(_log_prob_metrics(update, elements, clip_range) if update.first.log_probs else {}),
        **(weight_metrics(torch.cat(update.weights)) if update.weights else {}),
        **{name: statistics.fmean(values) for name, values in update.metrics.items()},
        "actor/pg_loss": statistics.fmean(update.losses) if update.losses else 0.0,
        "actor/grad_norm": max(update.grad_norms, default=0.0),
        "actor/skipped_updates": float(sum(not math.isfinite(norm) for norm in update.grad_norms)),
        **({f"actor/updates_{name}": float(count) for name, count in update.moved.items()} if len(update.moved) > 1 else {}),
        **({"actor/ref_kl": statistics.fmean(update.ref_kls)} if update.ref_kls else {}),
    }


def _log_prob_metrics(update: Update, elements: int, clip_range: float) -> dict[str, float]:
    first = update.first
    mini_batch = ratio_metrics(torch.cat(first.log_probs), torch.cat(first.old_log_probs), clip_range)
    return {
        **parity_metrics(
            torch.cat(first.rollout_log_probs),
            torch.cat(first.log_probs),
            torch.tensor(first.step_indices),
            elements,
            clip_range,
        ),
        **ratio_metrics(torch.cat(update.all.log_probs), torch.cat(update.all.old_log_probs), clip_range),
        "actor/pg_clipfrac_mb0": mini_batch["actor/pg_clipfrac"],
    }
