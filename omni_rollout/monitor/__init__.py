"""What a run shows: metrics as pure functions, alerts, the guard, and the places they are written to."""

from __future__ import annotations

from omni_rollout.monitor.alerts import Alert, find_alerts
from omni_rollout.monitor.guard import MismatchError, NotFiniteError, StoppedError, check_finite, must_recompute
from omni_rollout.monitor.images import CaptionedImage
from omni_rollout.monitor.last_words import last_words
from omni_rollout.monitor.metrics import parity_metrics, ratio_metrics, reward_metrics
from omni_rollout.monitor.monitor import Monitor
from omni_rollout.monitor.pairs import PPO_KL_COMPARES, old_pair
from omni_rollout.monitor.update import update_metrics

__all__ = [
    "PPO_KL_COMPARES",
    "Alert",
    "CaptionedImage",
    "MismatchError",
    "Monitor",
    "NotFiniteError",
    "StoppedError",
    "check_finite",
    "find_alerts",
    "last_words",
    "must_recompute",
    "old_pair",
    "parity_metrics",
    "ratio_metrics",
    "reward_metrics",
    "update_metrics",
]
