"""SiLU and GELU whose result for an element depends on that element alone.

torch's CPU kernels for the two compute the body of a vector and its scalar tail by different code, and every thread's share has
a tail of its own: length and threads decide the last bit, in fp32 and in bf16. Here every call is cut and padded so that no
share has a tail (`self_check` proves it on the machine at hand). On a GPU torch's kernels treat every element alike and are
used as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

ONE_THREAD = 2**14  # elements that torch gives to one thread, whichever of the two operators it is
ALL_THREADS = 2**15  # elements a thread, from which on all have equal shares
LANES = 64  # a multiple of what any vector body takes at a time


def exact_silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) in x's dtype. Differentiable."""
    return F.silu(x) if _in_one_call(x) else _applied(_SiLU, x)


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, in x's dtype. Differentiable."""
    return F.gelu(x, approximate="tanh") if _in_one_call(x) else _applied(_GELU, x)


def _in_one_call(x: torch.Tensor) -> bool:
    """Whether torch's own call has no tail in any thread's share: then its way back is taken too, without Python on it."""
    if x.device.type != "cpu":
        return True
    length, threads = x.numel(), torch.get_num_threads()
    if not x.is_contiguous():
        return False
    if length >= threads * ALL_THREADS:
        return length % (threads * LANES) == 0
    return length <= ONE_THREAD and length % LANES == 0


def _applied(function: type[torch.autograd.Function], x: torch.Tensor) -> torch.Tensor:
    result = function.apply(x)
    assert isinstance(result, torch.Tensor)
    return result


def _in_whole_vectors(operator: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`operator(x)`, in calls in which every thread's share is a multiple of LANES."""
    flat, threads = x.reshape(-1), torch.get_num_threads()
    out = torch.empty_like(flat)
    length, start = flat.numel(), 0
    if length >= threads * ALL_THREADS:
        start = length - length % (threads * LANES)
        operator(flat[:start], out=out[:start])
    while start + ONE_THREAD <= length:
        operator(flat[start : start + ONE_THREAD], out=out[start : start + ONE_THREAD])
        start += ONE_THREAD
    if start < length:
        out[start:] = operator(F.pad(flat[start:], (0, (start - length) % LANES)))[: length - start]
    return out.view(x.shape)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _in_whole_vectors(torch.ops.aten.silu, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _in_whole_vectors(partial(torch.ops.aten.gelu, approximate="tanh"), x)

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


class ExactPlainGELU(nn.GELU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return exact_gelu(input)


def install_activations(module: nn.Module) -> None:
    """Gives every SiLU and GELU below `module`, torch's or diffusers', the bits that depend on nothing but the element."""
    for layer in module.modules():
        if type(layer) is nn.SiLU:
            layer.__class__ = ExactSiLU
        elif type(layer) in (GELU, nn.GELU):
            gelu: Any = layer
            if gelu.approximate != "tanh":
                raise ValueError(f"GELU of approximate={gelu.approximate!r}: the exact one has the tanh form alone")
            gelu.__class__ = ExactGELU if type(layer) is GELU else ExactPlainGELU
