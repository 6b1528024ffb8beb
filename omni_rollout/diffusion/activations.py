"""SiLU and GELU whose result for an element depends on that element alone.

torch's CPU kernels for the two compute a vector's body and its scalar tail by different code, and every thread's share has a
tail of its own: length and threads decide the last bit, in fp32 and in bf16. Made of single operations that round the same
everywhere (exp, products, sums, quotients), they do not. On a GPU torch's own kernels treat every element alike and are used
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

_LINEAR = -2 * math.sqrt(2 / math.pi)  # GELU in its tanh form, arXiv 1606.08415: x / (1 + exp(x (linear + cubic x^2)))
_CUBIC = _LINEAR * 0.044715
_CHUNK = 2**16  # elements whose intermediate results stay in a core's cache


def exact_silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)), computed in fp32 and rounded once to x's dtype. Differentiable."""
    return _applied(_SiLU, x) if x.device.type == "cpu" else F.silu(x)


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, computed in fp32 and rounded once to x's dtype. Differentiable."""
    return _applied(_GELU, x) if x.device.type == "cpu" else F.gelu(x, approximate="tanh")


def _applied(function: type[torch.autograd.Function], x: torch.Tensor) -> torch.Tensor:
    result = function.apply(x)
    assert isinstance(result, torch.Tensor)
    return result


def _gated(x: torch.Tensor, exponent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """x / (1 + exp(exponent(x))), chunk by chunk."""
    flat = x.reshape(-1)
    out = torch.empty_like(flat)
    for source, target in zip(flat.split(_CHUNK), out.split(_CHUNK), strict=True):
        wide = source.float()
        gate = exponent(wide).exp_().add_(1)
        target.copy_(torch.div(wide, gate, out=gate))
    return out.view(x.shape)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _gated(x, torch.neg)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _gated(x, lambda wide: (wide * wide).mul_(_CUBIC).add_(_LINEAR).mul_(wide))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradients[0], x, approximate="tanh")


class ExactSiLU(nn.SiLU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return exact_silu(input)


class ExactGELU(GELU):
    """diffusers' projection with a GELU after it."""

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        return exact_gelu(gate)


def install_activations(module: nn.Module) -> None:
    """Gives every SiLU and diffusers GELU below `module` the bits that depend on nothing but the element."""
    for layer in module.modules():
        if type(layer) is nn.SiLU:
            layer.__class__ = ExactSiLU
        elif type(layer) is GELU:
            if layer.approximate != "tanh":
                raise ValueError(f"GELU of approximate={layer.approximate!r}: the exact one has the tanh form alone")
            layer.__class__ = ExactGELU
