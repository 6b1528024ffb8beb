"""Operators that round in the same places in the rollout engine and in the trainer.

The trainer's diffusers modules get other classes, never other parameter names: each `Exact*` class below replaces the
class of an existing module in place. The master weights stay fp32; a module casts them to the compute dtype as it
runs, so the weights that a step differentiates are, bit for bit, the weights that `effective_weights` hands to the
engine. What each operator cures, and by how much, is in docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

from omni_rollout.diffusion.products import exact_linear

SHARED_OUT = 32768  # elements, from which on torch wakes a second thread, for longer than so few are worth
COMPLEX_LANES = 32  # real numbers: a multiple of what a vector body for complex ones takes at a time; its tail rounds otherwise


@runtime_checkable
class HasEffectiveWeight(Protocol):
    """A layer whose forward multiplies by something derived from its parameters, not by a parameter itself."""

    compute_dtype: torch.dtype

    def effective_weight(self) -> torch.Tensor: ...

    def effective_bias(self) -> torch.Tensor | None: ...


class ExactLinear(nn.Linear):
    compute_dtype: torch.dtype

    def effective_weight(self) -> torch.Tensor:
        return self.weight.to(self.compute_dtype)

    def effective_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(self.compute_dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return exact_linear(input, self.effective_weight(), self.effective_bias())


class ExactRMSNorm(RMSNorm):
    """Rounds once, after the weight, as torch's RMSNorm in the engine; diffusers' own rounds before it as well."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, tuple(self.dim), _cast(self.weight, hidden_states.dtype), self.eps)


class ReferenceRMSNorm(RMSNorm):
    """diffusers' own roundings, with the fp32 master weight cast first, as a checkpoint in that dtype would have it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normalised = hidden_states * torch.rsqrt(variance + self.eps)
        return normalised.to(hidden_states.dtype) * _cast(self.weight, hidden_states.dtype)


def _cast(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    assert weight is not None, "Qwen-Image's RMSNorms all have weights"
    return weight.to(dtype)


class ExactLayerNorm(nn.LayerNorm):
    """Normalises in fp32, as the engine does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(input.dtype)


class ExactEmbedding(nn.Embedding):
    """Looks up in fp32 what the engine holds rounded."""

    compute_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.compute_dtype)


def exact_rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs with the table rounded to x's dtype, as the engine does.

    Args:
        x: [B, S, H, D].
        freqs: [S, D/2] complex64.
    """
    rotated = _Rotation.apply(x, freqs)
    assert isinstance(rotated, torch.Tensor)
    return rotated


class _Rotation(torch.autograd.Function):
    """(even, odd) -> (even cos - odd sin, odd cos + even sin), each product and sum rounded; the way back turns back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(freqs)
        return _rotate(x, freqs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (freqs,) = ctx.saved_tensors
        return _rotate(gradients[0], freqs.conj()), None


def _rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotate_into(out, x.contiguous(), freqs[:, None])
    return out


def rotate_into(out: torch.Tensor, x: torch.Tensor, freqs: torch.Tensor) -> None:
    """`exact_rope` of contiguous x, written to `out`, whose last dimension is contiguous. Not differentiable.

    As a product of complex numbers where there is one of x's dtype and it takes whole vectors: the same two products and a
    sum. Else in whole tensors, or in halves that no second thread is woken up for.

    Args:
        out, x: [..., H, D], whose heads lie beside each other.
        freqs: [..., 1, D/2].
    """
    narrow, token = x.shape[-1] % COMPLEX_LANES, x.shape[-2] * x.shape[-1]
    if x.dtype == torch.float32 and narrow and token % COMPLEX_LANES == 0:  # the heads of a token in one go
        row: tuple[int, ...] = (1, token)
        turns = freqs.expand(*freqs.shape[:-2], x.shape[-2], -1).reshape(*freqs.shape[:-2], 1, -1)
    else:
        row, turns = tuple(x.shape[-2:]), freqs
    if x.dtype == torch.float32 and x.device.type == "cpu" and _of_whole_vectors(x.numel(), row[-1]):
        pairs, places = (torch.view_as_complex(each.view(*x.shape[:-2], *row).unflatten(-1, (-1, 2))) for each in (x, out))
        torch.mul(pairs, turns, out=places)
        return
    cos, sin = (part.to(x.dtype) for part in (freqs.real, freqs.imag))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    if even.numel() < SHARED_OUT:
        out.copy_(torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2))
        return
    signed = torch.stack((-sin, sin), dim=-1).flatten(-2)  # what each place takes its neighbour with
    neighbours = torch.stack((odd, even), dim=-1).flatten(-2)
    torch.mul(x, cos.repeat_interleave(2, dim=-1), out=out).add_(neighbours.mul_(signed))


def _of_whole_vectors(length: int, row: int) -> bool:
    """Whether rows of real numbers, and every thread's share of all of them, are whole vectors of complex ones."""
    pairs, lanes = length // 2, COMPLEX_LANES // 2
    shares = min(torch.get_num_threads(), -(-pairs // SHARED_OUT))
    return row % COMPLEX_LANES == 0 and -(-pairs // shares) % lanes == 0


def install_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives every plain linear layer below `module` exact rows and a compute dtype of its own."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = ExactLinear
            cast(ExactLinear, layer).compute_dtype = dtype


def install_embeddings(module: nn.Module, dtype: torch.dtype) -> None:
    for layer in module.modules():
        if type(layer) is nn.Embedding:
            layer.__class__ = ExactEmbedding
            cast(ExactEmbedding, layer).compute_dtype = dtype


def install_rms_norms(module: nn.Module, kind: type[RMSNorm] = ExactRMSNorm) -> None:
    for layer in module.modules():
        if type(layer) is RMSNorm:
            layer.__class__ = kind


def install_layer_norms(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if type(layer) is nn.LayerNorm:
            layer.__class__ = ExactLayerNorm


def merged_weight(
    base: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """W + scale * B A, the sum in fp32 and rounded once: by the trainer's layers, and by a server that is sent the factors."""
    return (base.float() + scale * (factor_b.float() @ factor_a.float())).to(dtype)


def effective_weights(
    module: nn.Module, dtype: torch.dtype, gathered: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the checkpoint, what the forward computes with in `dtype`), for every parameter; detached.

    Args:
        gathered: of a trainer engine that holds parameters in parts: inside, those of a layer are whole. A tensor may be gone
            when the next one is asked for.
    """

    def walk(layer: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        with gathered(layer):
            yield from inside(layer, prefix)

    def inside(layer: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(layer, HasEffectiveWeight):  # what lies below it, such as LoRA factors, is in its weight already
            yield f"{prefix}weight", layer.effective_weight()
            bias = layer.effective_bias()
            if bias is not None:
                yield f"{prefix}bias", bias
            return
        for name, parameter in layer.named_parameters(recurse=False):
            yield f"{prefix}{name}", parameter.to(dtype)
        for name, child in layer.named_children():
            yield from walk(child, f"{prefix}{name}.")

    with torch.no_grad():
        yield from ((name, tensor.detach()) for name, tensor in walk(module, ""))
