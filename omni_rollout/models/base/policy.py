"""Policies of one expert or two on the trainer's side, and what a trajectory tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.types import Trajectory


class Experts(nn.Module):
    """Several transformers, of which each step takes one; children are named as their folders in the checkpoint."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, *, expert: int, **inputs: Any) -> Any:
        return list(self.children())[expert](**inputs)

    def enable_gradient_checkpointing(self) -> None:
        for network in self.children():
            enable: Any = network.enable_gradient_checkpointing
            enable()


def experts(policy: nn.Module) -> dict[str, nn.Module]:
    """Folder in the checkpoint -> transformer, in the order of the family's `EXPERTS`.

    Parameters of a policy of one have bare names, of several `<folder>.<name>`.
    """
    inner = (
        policy.module if not isinstance(policy, Experts) and isinstance(getattr(policy, "module", None), Experts) else policy
    )
    return dict(inner.named_children()) if isinstance(inner, Experts) else {"transformer": policy}


def steps_to_learn(trajectory: Trajectory) -> list[int]:
    """Positions in its schedule that can be learned from: its stochastic steps; all of one that was sampled by the ode."""
    return trajectory.step_indices.tolist() or list(range(len(trajectory.timesteps)))


def conditioning(trajectory: Trajectory, device: torch.device | None) -> Conditioning:
    """Guided as it was sampled, where it was sampled by stochastic steps. On a device; None: where its tensors are.

    What final latents of an ode teach is the velocity of the prompt alone: no straight line leads to a guided one.
    """
    stochastic = bool(len(trajectory.step_indices))

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if device is None else tensor.to(device)

    def if_guided(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None or not stochastic else there(tensor)

    return Conditioning(
        prompt_embeds=there(trajectory.prompt_embeds),
        prompt_embeds_mask=there(trajectory.prompt_embeds_mask),
        negative_prompt_embeds=if_guided(trajectory.negative_prompt_embeds),
        negative_prompt_embeds_mask=if_guided(trajectory.negative_prompt_embeds_mask),
        spec=trajectory.spec,
        conditions={name: there(tensor) for name, tensor in trajectory.conditions.items()},
    )


def batch_keys(trajectories: Sequence[Trajectory]) -> list[list[tuple[object, ...]]]:
    """One key per trajectory and step of `steps_to_learn`; steps of equal keys may share a forward pass."""
    rows = [conditioning(trajectory, None) for trajectory in trajectories]
    return [
        [row.batch_key(step) for step in steps_to_learn(trajectory)] for row, trajectory in zip(rows, trajectories, strict=True)
    ]
