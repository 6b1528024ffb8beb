"""Qwen-Image's VAE decodes videos; its images are videos of one frame.

The two earlier frames that a convolution over three of them then sees are zeros, and so is what two thirds of its products are
with. Left out, an image takes a third of the arithmetic, and differs from the VAE's own in the last bits of fp32.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import nn


class FrameConv(QwenImageCausalConv3d):
    """On one frame without a past the convolution over space with the newest frame's weights; else as it was."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] > 1 or cache_x is not None:
            return super().forward(x, cache_x)
        columns, _, rows, *_ = cast(tuple[int, ...], self._padding)
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(rows, columns)).unsqueeze(2)


def install_frame_convs(decoder: nn.Module) -> None:
    for layer in decoder.modules():
        if type(layer) is QwenImageCausalConv3d and tuple(layer.stride) == (1, 1, 1):
            layer.__class__ = FrameConv
