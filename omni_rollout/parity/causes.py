"""Every known cause of a difference, each as one rule that the trainer breaks for as long as a context lasts.

The rollout is right, so what a cause adds to an exact recomputation is what it contributes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from omni_rollout.diffusion import attention, attention_products, products, sde
from omni_rollout.diffusion.sde import per_sample
from omni_rollout.models import family_module
from omni_rollout.models.base import velocity as base
from omni_rollout.models.base.causes import Cause, Setting, nothing, swapped
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.lora import ADAPTER, MergedLoraLinear
from omni_rollout.types import Trajectory


def rounded_latents(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, latents=trajectory.latents.bfloat16().float())


def calls_as_they_come(_: Setting) -> AbstractContextManager[None]:
    def multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: int) -> torch.Tensor:
        return F.linear(rows, weight, bias)

    return swapped(products, "_multiply", multiply)


def single_precision_mean(_: Setting) -> AbstractContextManager[None]:
    def log_prob(
        prev_sample: torch.Tensor, mean: torch.Tensor, step_std: torch.Tensor, stds: list[float], form: str
    ) -> torch.Tensor:
        squared = (prev_sample - mean) ** 2
        if form == "unnormalised":
            return -squared.mean(dim=tuple(range(1, squared.ndim)))
        constant = torch.tensor([torch.pi], device=mean.device).mul(2).log() / 2
        return (-squared / (2 * step_std**2) - step_std.log() - constant).mean(dim=tuple(range(1, squared.ndim)))

    return swapped(sde, "gaussian_log_prob", log_prob)


@contextmanager
def math_attention(_: Setting) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), swapped(attention, "by_products", lambda *_: False):
        yield


def low_precision_guidance(setting: Setting) -> AbstractContextManager[None]:
    def guide(
        velocity: torch.Tensor, negative_velocity: torch.Tensor, true_cfg_scale: torch.Tensor | float, *, renormalise: bool
    ) -> torch.Tensor:
        positive, negative = velocity.to(setting.dtype), negative_velocity.to(setting.dtype)
        scale = torch.as_tensor(true_cfg_scale, dtype=setting.dtype, device=positive.device)
        combined = negative + per_sample(scale, positive) * (positive - negative)
        if not renormalise:
            return combined.float()
        return (combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))).float()

    return swapped(base, "guide", guide)


def unmerged_lora(_: Setting) -> AbstractContextManager[None]:
    def forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        base, dtype = self.get_base_layer(), self.compute_dtype
        low = F.linear(x, self.lora_A[ADAPTER].weight.to(dtype))
        return base(x) + self.scaling[ADAPTER] * F.linear(low, self.lora_B[ADAPTER].weight.to(dtype))

    return swapped(MergedLoraLinear, "forward", forward)


@contextmanager
def compiled_blocks(setting: Setting) -> Iterator[None]:
    networks: list[Any] = list(experts(setting.policy).values())
    blocks: list[Any] = [
        module for network in networks for module in network.modules() if type(module).__name__ in network._repeated_blocks
    ]
    for block in blocks:
        block.compile()
    uncompiled = torch.compiler.disable(products.onednn)  # torch's compiler takes that operator of oneDNN's for its own
    try:
        with swapped(products, "onednn", uncompiled), swapped(attention_products, "onednn", uncompiled):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


SHARED = (
    Cause(
        name="latent_storage",
        breaks="latents stored in bfloat16",
        settled_by="omni_rollout/types.py, omni_rollout/trajectories/capsule.py",
        broken=nothing,
        record=rounded_latents,
    ),
    Cause(
        name="constant_shape",
        breaks="products are as torch makes them: in calls of as many rows as the batch has",
        settled_by="omni_rollout/diffusion/products.py",
        broken=calls_as_they_come,
    ),
    Cause(
        name="log_prob_reduction",
        breaks="log-prob averaged in fp32",
        settled_by="omni_rollout/diffusion/sde.py",
        broken=single_precision_mean,
    ),
    Cause(
        name="attention_backend",
        breaks="torch's math kernel instead of its fused one, or of products",
        settled_by="omni_rollout/models/*/policy.py",
        broken=math_attention,
    ),
    Cause(
        name="guidance_dtype",
        breaks="guidance combined in the model's dtype",
        settled_by="omni_rollout/diffusion/guidance.py",
        broken=low_precision_guidance,
    ),
    Cause(
        name="compile",
        breaks="the trainer's blocks compiled, the engine's eager",
        settled_by="omni_rollout/rollout/engine.py",
        broken=compiled_blocks,
        slow=True,
    ),
    Cause(
        name="lora_application",
        breaks="LoRA factors applied beside the weight instead of merged into it",
        settled_by="omni_rollout/policy/lora.py",
        broken=unmerged_lora,
    ),
)


def causes(family: str) -> tuple[Cause, ...]:
    """In the order in which they are added up: the family's `causes.CAUSES` names those of `SHARED` among its own."""
    shared = {cause.name: cause for cause in SHARED}
    listed = family_module(family, "causes").CAUSES
    return tuple(shared[entry] if isinstance(entry, str) else entry for entry in listed)
