"""How much a video moves: the reward to try a training loop of videos on."""

from __future__ import annotations

import numpy as np

from omni_rollout.rewards.base.contract import EachAlone, Reward


def motion(frames: np.ndarray) -> float:
    """[F, H, W, 3] uint8 -> mean absolute difference of neighbouring frames, as a share of full scale: 0 (a still) to 1."""
    return 0.0 if len(frames) == 1 else float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()) / 255


def make(threads: int) -> Reward:
    return EachAlone("motion", "video", lambda frames, *_: motion(frames))
