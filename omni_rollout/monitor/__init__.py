"""What a run shows: metrics as pure functions, and the places they are written to."""

from __future__ import annotations

from omni_rollout.monitor.images import CaptionedImage
from omni_rollout.monitor.metrics import parity_metrics, ratio_metrics, reward_metrics
from omni_rollout.monitor.monitor import Monitor

__all__ = ["CaptionedImage", "Monitor", "parity_metrics", "ratio_metrics", "reward_metrics"]
