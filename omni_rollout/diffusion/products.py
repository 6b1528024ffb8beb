"""Products of rows with a weight, in calls of constant shape: same shape, same kernel, same bits.

A library chooses a kernel, its blocking of the sum and its sharing out among threads by the shape of a call, so a row
multiplied in a call of 300 rows has other bits than the same row in a call of 20. Here rows are packed into blocks of a number
that the layer alone decides, the last one padded; within a block, neither a row's position nor its neighbours touch its bits
(`self_check` proves it on the device at hand). Every product of the forward pass goes through `exact_linear`, on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F

CONDITIONING_ROWS = 16  # of a layer that is given one row a sample: [B, K]
# Of a layer that is given tokens, [B, S, K]: narrow layers waste more on padding than on calls, wide ones the other way round.
NARROW_ROWS, WIDE_ROWS = 128, 256
WIDE = 2**20  # weights of a wide layer, at least
# On a GPU, of any layer that is given tokens. Not measured. By arithmetic, in tiles of 128 x 256 on 132 multiprocessors: 1024
# rows of a layer with 3072 features make 8 x 12 = 96 tiles, 73% of a round; with 12288, 384 tiles, 97% of three rounds. 2048
# rows of the former fill two rounds to the same 73% and pad twice as much; 512 rows fill one to 36%.
CUDA_ROWS = 1024
ALIGNMENT = 256  # bytes: cuBLAS chooses by the alignment of pointers too, up to this


class Calls(Enum):
    """How rows are shared out among calls."""

    blocks = "blocks"  # of a constant number of rows, whatever samples they belong to
    samples = "samples"  # one sample a call: for a device whose kernels give a row other bits at another position


_calls = Calls.blocks


def calls() -> Calls:
    return _calls


def set_calls(chosen: Calls) -> None:
    """Of this whole process: what `self_check` found to be exact."""
    global _calls
    _calls = chosen


def block_rows(out_features: int, in_features: int, *, conditioning: bool, device: str) -> int:
    """Rows of every call of a layer, on a device of this type."""
    if conditioning:
        return CONDITIONING_ROWS
    if device == "cuda":
        return CUDA_ROWS
    return WIDE_ROWS if out_features * in_features >= WIDE else NARROW_ROWS


def exact_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: Sequence[int] | None = None
) -> torch.Tensor:
    """x @ weight.T + bias, each row with the same bits whatever other rows there are.

    Args:
        x: [B, S, K], tokens; or [B, K], one conditioning row a sample.
        weight: [N, K].
        bias: [N], or None.
        parts: output features of the projections that a fused weight is made of: each is multiplied by itself, as the
            layers are that were not fused, since N is part of a call's shape too.

    Returns:
        [..., N] in x's dtype. Differentiable.
    """
    if parts is not None and len(parts) > 1:
        biases = [None] * len(parts) if bias is None else bias.split(list(parts))
        weights = weight.split(list(parts))
        return torch.cat([exact_linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    conditioning = x.dim() == 2
    call = block_rows(*weight.shape, conditioning=conditioning, device=weight.device.type)
    if _calls is Calls.samples:
        sample = 1 if conditioning else x.shape[-2]
        call = max(sample, CONDITIONING_ROWS)
    else:
        sample = call
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias)):
        product = _Product.apply(rows, weight, bias, sample, call)
        assert isinstance(product, torch.Tensor)
    else:
        product = _multiply(rows, weight, bias, sample, call)
    return product.view(*x.shape[:-1], weight.shape[0])


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sample: int, call: int) -> torch.Tensor:
    """`sample` rows after `sample` rows, each portion in a call of `call` rows."""
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for portion, place in zip(rows.split(sample), out.split(sample), strict=True):
        if len(portion) == call:
            _call(portion, weight, bias, place)
        else:
            padded = F.pad(portion, (0, 0, 0, call - len(portion)))
            place.copy_(_call(padded, weight, bias, rows.new_empty(call, weight.shape[0]))[: len(portion)])
    return out


def _call(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    if rows.device.type == "cuda":  # a slice may begin anywhere
        rows, weight, bias = _aligned(rows), _aligned(weight), None if bias is None else _aligned(bias)
        if out.data_ptr() % ALIGNMENT:
            return out.copy_(_product(rows, weight, bias, torch.empty_like(out)))
    return _product(rows, weight, bias, out)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Itself, or its copy where a fresh tensor of torch's lies."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


class _Product(torch.autograd.Function):
    """Forward in calls of constant shape; backward in one call each, as of `F.linear`: no other program has to match it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sample: int,
        call: int,
    ) -> torch.Tensor:
        of_rows, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return _multiply(rows, weight, bias, sample, call)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        of_bias = ctx.needs_input_grad[2]
        return (
            None if weight is None else gradient @ weight,
            None if rows is None else gradient.t() @ rows,
            gradient.sum(0) if of_bias else None,
            None,
            None,
        )
