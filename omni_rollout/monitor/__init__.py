"""What a run shows: metrics as pure functions, alerts, the guard, and the places they are written to."""

from __future__ import annotations

from omni_rollout.monitor.alerts import Alert, find_alerts
from omni_rollout.monitor.guard import (
    Inspection,
    MismatchError,
    NotFiniteError,
    StoppedError,
    check_finite,
    inspect,
    inspected_rows,
)
from omni_rollout.monitor.hacking import Guards
from omni_rollout.monitor.last_words import last_words
from omni_rollout.monitor.metrics import parity_metrics, ratio_metrics, reward_metrics
from omni_rollout.monitor.monitor import Monitor
from omni_rollout.monitor.step import step_metrics, step_notes
from omni_rollout.monitor.update import update_metrics
from omni_rollout.trajectories.sheet import CaptionedImage

__all__ = [
    "Alert",
    "CaptionedImage",
    "Guards",
    "Inspection",
    "MismatchError",
    "Monitor",
    "NotFiniteError",
    "StoppedError",
    "check_finite",
    "find_alerts",
    "inspect",
    "inspected_rows",
    "last_words",
    "parity_metrics",
    "ratio_metrics",
    "reward_metrics",
    "step_metrics",
    "step_notes",
    "update_metrics",
]
