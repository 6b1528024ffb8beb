"""The VAEs' norms over channels, with the bits of diffusers' own and a fraction of their time on a CPU.

torch takes the Euclidean norm over a dimension that is not the innermost one element by element: half to two thirds of decoding
an image. Here whole planes are added, one channel after the other, which is that kernel's order of summation.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

EPSILON = 1e-12  # of torch.nn.functional.normalize


def channel_lengths(x: torch.Tensor) -> torch.Tensor:
    """[B, C, ...] fp32 -> [B, 1, ...]: `torch.linalg.vector_norm(x, dim=1, keepdim=True)`, bit for bit."""
    if not x.is_contiguous() or x[0, 0].numel() == 1:  # the channels of a pixel lie together: torch has a fast kernel for it
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    total, *others = x.square().split(1, dim=1)
    for plane in others:
        total += plane
    # torch's own root of fp32 is not always the nearest one, which the kernel's is; by way of fp64 it is.
    return total.double().sqrt().float()


class _ByPlanes(nn.Module):
    """The first base of one of diffusers' norms."""

    channel_first: bool
    scale: float
    gamma: nn.Parameter
    bias: nn.Parameter | float  # 0.0 for none

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.channel_first or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        values = x.float()
        normalized = (values / channel_lengths(values).clamp_min_(EPSILON)).to(x.dtype)
        normalized.mul_(self.scale).mul_(self.gamma)
        return normalized if isinstance(self.bias, float) else normalized.add_(self.bias)


class QwenNormByPlanes(_ByPlanes, QwenImageRMS_norm):
    pass


class WanNormByPlanes(_ByPlanes, WanRMS_norm):
    pass


BY_PLANES: dict[type[nn.Module], type[nn.Module]] = {QwenImageRMS_norm: QwenNormByPlanes, WanRMS_norm: WanNormByPlanes}


def install_channel_norms(vae: nn.Module) -> None:
    """Gradients, if they are asked for, are those of diffusers' own norms."""
    for layer in vae.modules():
        layer.__class__ = BY_PLANES.get(type(layer), type(layer))
