"""Wan2.2 on the trainer's side: diffusers' two transformers, computing what the engine computes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from omni_rollout.diffusion.machine import pin_switches
from omni_rollout.models.base.network import Held, load_network
from omni_rollout.models.base.policy import Experts, experts
from omni_rollout.models.wan2_2 import operators, spec
from omni_rollout.models.wan2_2.checkpoint import boundary_misfit, read_index
from omni_rollout.types import Trajectory

# What LoRA is added to, and the class of diffusers whose pipelines read what is saved.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_PIPELINE = "WanPipeline"


class WanExperts(Experts):
    """Both, and what model_index.json says of them."""

    index: dict[str, Any]


def load_policy(path: str, dtype: torch.dtype, parity: str = "exact", held: Held | None = None) -> WanExperts:
    """The checkpoint's transformers with their weights as they are there, computing in `dtype`.

    Round where the engine's transformers do (`exact`, `fast`) or where diffusers' own do (`reference`).

    Args:
        held: see `load_network`; names begin with the folder of the expert.

    Raises:
        UserError: a checkpoint that is none of this family's.
        WeightSyncError: see `load_network`.
    """
    pin_switches()
    index = read_index(path)
    networks = {}
    for name in spec.EXPERTS:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in (held or {}).items() if key.startswith(f"{name}.")}
        loaded = load_network(WanTransformer3DModel, path, name, own)
        operators.install(loaded, dtype, parity)
        networks[name] = loaded
    policy = WanExperts(networks)
    policy.index = index
    return policy.eval()


def network(
    policy: torch.nn.Module, *, expert: int = 0, encoder_hidden_states_mask: None = None, **inputs: Any
) -> torch.Tensor:
    """The expert, perhaps wrapped by a trainer engine, on what `velocity` gives it. Wan's text has no mask."""
    assert encoder_hidden_states_mask is None
    return policy(expert=expert, **inputs, return_dict=False)[0]


def misfit(policy: Any, trajectory: Trajectory) -> str | None:
    """Why the trajectory cannot be one of these transformers'; None: it may be."""
    first: Any = next(iter(experts(policy).values()))
    expected = {
        "latents": (trajectory.latents.shape[1], first.config.out_channels),
        "prompt_embeds": (trajectory.prompt_embeds.shape[-1], first.config.text_dim),
    }
    for name, (found, size) in expected.items():
        if found != size:
            return f"{name} has {found} channels, the model has {size}"
    return boundary_misfit(policy.index, trajectory.spec.extra["boundary_ratio"])
