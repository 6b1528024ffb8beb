"""Every known cause of a difference, each as one rule that the trainer breaks for as long as a context lasts.

The rollout is right, so what a cause adds to an exact recomputation is what it contributes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omni_rollout.diffusion import products, sde
from omni_rollout.diffusion.exact_ops import ExactLayerNorm, ExactRMSNorm, HasEffectiveWeight
from omni_rollout.models import family_module
from omni_rollout.policy.lora import ADAPTER, MergedLoraLinear
from omni_rollout.types import Trajectory


@dataclass(frozen=True)
class Setting:
    """What a cause may need to know."""

    policy: nn.Module
    family: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Cause:
    name: str
    breaks: str
    settled_by: str  # the file that keeps the rule
    broken: Callable[[Setting], AbstractContextManager[None]]
    record: Callable[[Trajectory], Trajectory] = lambda trajectory: trajectory
    slow: bool = False  # left out of the cumulative series


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def nothing(_: Setting) -> Iterator[None]:
    yield


def double_rounded_timestep(setting: Setting) -> AbstractContextManager[None]:
    def rounded_first(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return timesteps.to(dtype) / 1000

    return swapped(family_module(setting.family, "velocity"), "model_timestep", rounded_first)


def rounded_latents(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, latents=trajectory.latents.bfloat16().float())


def stock_rms_norm(_: Setting) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)  # as a checkpoint in that dtype would have it
        stock: Any = SimpleNamespace(weight=weight, bias=self.bias, eps=self.eps)
        return RMSNorm.forward(stock, hidden_states)

    return swapped(ExactRMSNorm, "forward", forward)


def stock_rope(setting: Setting) -> AbstractContextManager[None]:
    probe = family_module(setting.family, "probe")
    return probe.swapped_rope(probe.stock_rope)


def stock_layer_norm(_: Setting) -> AbstractContextManager[None]:
    return swapped(ExactLayerNorm, "forward", nn.LayerNorm.forward)


@contextmanager
def strided_projections(setting: Setting) -> Iterator[None]:
    """The attention's output projections read a slice of the joint sequence, as the engine's own code has it."""
    endings = family_module(setting.family, "probe").OUTPUT_PROJECTIONS

    def forward_of(layer: HasEffectiveWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            joint = torch.cat([x, x[:, :1]], dim=1)
            return F.linear(joint[:, : x.shape[1]], layer.effective_weight(), layer.effective_bias())

        return forward

    with ExitStack() as stack:
        for name, layer in setting.policy.named_modules():
            if name.endswith(endings) and isinstance(layer, HasEffectiveWeight):
                stack.enter_context(swapped(layer, "forward", forward_of(layer)))
        yield


@contextmanager
def changed_text(setting: Setting, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Changes the keyword arguments of every call of the transformer."""

    def hook(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = dict(inputs)
        change(changed)
        return args, changed

    handle = setting.policy.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def mask_kept(inputs: dict[str, Any]) -> None:
    if inputs["encoder_hidden_states_mask"] is None:
        embeds = inputs["encoder_hidden_states"]
        inputs["encoder_hidden_states_mask"] = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)


def mask_dropped(inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states_mask"] = None


def trimmed(inputs: dict[str, Any]) -> None:
    mask = inputs["encoder_hidden_states_mask"]
    if mask is not None:
        longest = int(mask.sum(dim=1).max())
        short = mask[:, :longest]
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :longest]
        inputs["encoder_hidden_states_mask"] = None if bool(short.all()) else short


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
            return -squared.mean(dim=(1, 2))
        constant = torch.tensor([torch.pi], device=mean.device).mul(2).log() / 2
        return (-squared / (2 * step_std**2) - step_std.log() - constant).mean(dim=(1, 2))

    return swapped(sde, "gaussian_log_prob", log_prob)


@contextmanager
def math_attention(_: Setting) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def low_precision_guidance(setting: Setting) -> AbstractContextManager[None]:
    def guide(velocity: torch.Tensor, negative_velocity: torch.Tensor, true_cfg_scale: torch.Tensor | float) -> torch.Tensor:
        positive, negative = velocity.to(setting.dtype), negative_velocity.to(setting.dtype)
        scale = torch.as_tensor(true_cfg_scale, dtype=setting.dtype, device=positive.device).reshape(-1, 1, 1)
        combined = negative + scale * (positive - negative)
        return (combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))).float()

    return swapped(family_module(setting.family, "velocity"), "guide", guide)


def unmerged_lora(_: Setting) -> AbstractContextManager[None]:
    def forward(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        base, dtype = self.get_base_layer(), self.compute_dtype
        low = F.linear(x, self.lora_A[ADAPTER].weight.to(dtype))
        return base(x) + self.scaling[ADAPTER] * F.linear(low, self.lora_B[ADAPTER].weight.to(dtype))

    return swapped(MergedLoraLinear, "forward", forward)


@contextmanager
def compiled_blocks(setting: Setting) -> Iterator[None]:
    policy: Any = setting.policy
    blocks: list[Any] = [module for module in policy.modules() if type(module).__name__ in policy._repeated_blocks]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


FAMILY = "omni_rollout/models/*/velocity.py"
OPS = "omni_rollout/diffusion/exact_ops.py"
CAUSES = (  # in the order in which they are added up
    Cause(
        name="timestep_cast",
        breaks="timestep rounded to the model's dtype before the division by 1000",
        settled_by="omni_rollout/diffusion/schedule.py",
        broken=double_rounded_timestep,
    ),
    Cause(
        name="latent_storage",
        breaks="latents stored in bfloat16",
        settled_by="omni_rollout/types.py, omni_rollout/trajectories/capsule.py",
        broken=nothing,
        record=rounded_latents,
    ),
    Cause(name="rms_norm", breaks="diffusers' RMSNorm: rounds before the weight too", settled_by=OPS, broken=stock_rms_norm),
    Cause(name="rope", breaks="diffusers' RoPE: complex64 instead of the model's dtype", settled_by=OPS, broken=stock_rope),
    Cause(name="layer_norm", breaks="LayerNorm in the model's dtype", settled_by=OPS, broken=stock_layer_norm),
    Cause(
        name="contiguity",
        breaks="output projections multiply a strided input",
        settled_by=f"{OPS}, omni_rollout/models/*/rollout.py",
        broken=strided_projections,
    ),
    Cause(
        name="mask_kept",
        breaks="an all-true mask is given to the transformer",
        settled_by=FAMILY,
        broken=lambda setting: changed_text(setting, mask_kept),
    ),
    Cause(
        name="width_trimmed",
        breaks="text trimmed to the longest prompt of the batch",
        settled_by="omni_rollout/models/*/rollout.py",
        broken=lambda setting: changed_text(setting, trimmed),
    ),
    Cause(
        name="constant_shape",
        breaks="products run as they come: in calls of as many rows as the batch has",
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
        breaks="torch's math kernel instead of its fused one",
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
        name="mask_dropped",
        breaks="padding is attended to",
        settled_by=FAMILY,
        broken=lambda setting: changed_text(setting, mask_dropped),
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
