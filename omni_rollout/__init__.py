"""RL post-training of diffusion models in which the rollout engine and the trainer agree bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_rollout.diffusion.sde import SDEStep, sde_step
    from omni_rollout.rollout.engine import RolloutEngine
    from omni_rollout.rollout.remote import RemoteEngine
    from omni_rollout.trajectories.capsule import load_capsule, save_capsule
    from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec, Trajectory

__version__ = "0.1.0"

_HOMES = {  # public name -> module; imported on first use, so that `import omni_rollout` costs no torch
    "RolloutEngine": "omni_rollout.rollout.engine",
    "RemoteEngine": "omni_rollout.rollout.remote",
    "save_capsule": "omni_rollout.trajectories.capsule",
    "load_capsule": "omni_rollout.trajectories.capsule",
    "SDEStep": "omni_rollout.diffusion.sde",
    "sde_step": "omni_rollout.diffusion.sde",
    "Prompt": "omni_rollout.types",
    "RolloutRequest": "omni_rollout.types",
    "SamplingSpec": "omni_rollout.types",
    "Trajectory": "omni_rollout.types",
}
__all__ = [
    "Prompt",
    "RemoteEngine",
    "RolloutEngine",
    "RolloutRequest",
    "SDEStep",
    "SamplingSpec",
    "Trajectory",
    "load_capsule",
    "save_capsule",
    "sde_step",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'omni_rollout' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
