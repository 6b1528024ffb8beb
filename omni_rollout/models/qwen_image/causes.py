"""The rules whose breaking costs Qwen-Image its equal bits, each broken on the trainer's side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

from omni_rollout.diffusion.exact_ops import ExactLayerNorm, ExactRMSNorm, HasEffectiveWeight
from omni_rollout.models.base.causes import Cause, Setting, changed_text, swapped
from omni_rollout.models.qwen_image import probe, velocity


def double_rounded_timestep(setting: Setting) -> AbstractContextManager[None]:
    def rounded_first(timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return timesteps.to(dtype) / 1000

    return swapped(velocity, "model_timestep", rounded_first)


def stock_rms_norm(_: Setting) -> AbstractContextManager[None]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)  # as a checkpoint in that dtype would have it
        stock: Any = SimpleNamespace(weight=weight, bias=self.bias, eps=self.eps)
        return RMSNorm.forward(stock, hidden_states)

    return swapped(ExactRMSNorm, "forward", forward)


def stock_rope(_: Setting) -> AbstractContextManager[None]:
    return probe.swapped_rope(probe.stock_rope)


def stock_layer_norm(_: Setting) -> AbstractContextManager[None]:
    return swapped(ExactLayerNorm, "forward", nn.LayerNorm.forward)


@contextmanager
def strided_projections(setting: Setting) -> Iterator[None]:
    """The attention's output projections read a slice of the joint sequence, as the engine's own code has it."""
    endings = probe.OUTPUT_PROJECTIONS

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


FAMILY = "omni_rollout/models/*/velocity.py"
OPS = "omni_rollout/diffusion/exact_ops.py"
CAUSES: tuple[Cause | str, ...] = (
    Cause(
        name="timestep_cast",
        breaks="timestep rounded to the model's dtype before the division by 1000",
        settled_by="omni_rollout/diffusion/schedule.py",
        broken=double_rounded_timestep,
    ),
    "latent_storage",
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
    "constant_shape",
    "log_prob_reduction",
    "attention_backend",
    "guidance_dtype",
    Cause(
        name="mask_dropped",
        breaks="padding is attended to",
        settled_by=FAMILY,
        broken=lambda setting: changed_text(setting, mask_dropped),
    ),
    "compile",
    "lora_application",
)
