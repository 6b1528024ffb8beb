"""The VAEs' norms over channels, with the bits of their own classes and a fraction of their time on a CPU.

torch takes the Euclidean norm over a dimension that is not the innermost one element by element: half to two thirds of decoding
an image. Here whole planes are added, one channel after the other, which is that kernel's order of summation.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import nn

# diffusers' and vllm-omni's own of that name, and what vllm-omni puts in the place of diffusers' WanRMS_norm
NORMS = ("QwenImageRMS_norm", "RMSNormVAE")
EPSILON = 1e-12  # of torch.nn.functional.normalize, where a class has none of its own
PIXELS = 1024  # of smaller planes torch's kernel is as fast


def channel_lengths(x: torch.Tensor) -> torch.Tensor:
    """[B, C, ...] fp32 -> [B, 1, ...]: `torch.linalg.vector_norm(x, dim=1, keepdim=True)`, bit for bit."""
    if not x.is_contiguous() or prod(x.shape[2:]) < 2:  # the channels of a pixel lie together: torch has a fast kernel for it
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    total, *others = x.square().split(1, dim=1)
    for plane in others:
        total += plane
    # torch's own root of fp32 is not always the nearest one, which the kernel's is; by way of fp64 it is.
    return total.double().sqrt().float()


class ByPlanes(nn.Module):
    """The first base of a norm, whose own forward is taken wherever this one is not known to have its bits."""

    upcasts: bool  # to fp32, before anything else
    channel_first: bool
    scale: float
    gamma: nn.Parameter
    bias: nn.Parameter | float | None
    epsilon: float = EPSILON

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        known = (
            self.channel_first and x.device.type == "cpu" and (half or x.dtype == torch.float32) and x.dtype == self.gamma.dtype
        )
        if not known or prod(x.shape[2:]) < PIXELS or torch.is_grad_enabled():
            return super().forward(x)
        values = x.float() if self.upcasts else x
        lengths = channel_lengths(values.float()).to(values.dtype)
        normalized = (values / lengths.clamp_min_(self.epsilon)).to(x.dtype).mul_(self.scale).mul_(self.gamma)
        return normalized if self.bias is None else normalized.add_(self.bias)


@cache
def _by_planes(norm: type[nn.Module]) -> type[nn.Module]:
    return type(f"{norm.__name__}ByPlanes", (ByPlanes, norm), {"upcasts": norm.__module__.startswith("diffusers.")})


def install_channel_norms(vae: nn.Module) -> None:
    """Gradients, if they are asked for, are those of the layers' own classes."""
    for layer in vae.modules():
        if type(layer).__name__ in NORMS:
            layer.__class__ = _by_planes(type(layer))
