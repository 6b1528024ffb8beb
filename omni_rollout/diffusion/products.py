"""Products of rows with a weight, in calls of constant shape: same shape, same kernel, same bits.

A library chooses a kernel, its blocking of the sum and its sharing out among threads by the shape of a call, so a row
multiplied in a call of 300 rows has other bits than the same row in a call of 20. Here rows are packed into blocks of a number
that the layer alone decides, the last one padded; within a block, neither a row's position nor its neighbours touch its bits
(`self_check` proves it on the device at hand). Every product of the forward pass goes through `exact_linear`, on both sides.

Where `self_check` finds that calls of other numbers of rows compute the very bits of those blocks, in every row, they are taken
as well: large ones for many rows, small ones for few. Likewise products with a weight in oneDNN's own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from omni_rollout.diffusion.machine import float32_by_onednn, threads_of_bits

CONDITIONING_ROWS = 16  # of a layer that is given one row a sample: [B, K]
# Of a layer that is given tokens, [B, S, K]: narrow layers waste more on padding than on calls, wide ones the other way round.
NARROW_ROWS, WIDE_ROWS = 128, 256
WIDE = 2**20  # weights of a wide layer, at least
WIDEST = 2**23  # from here on no weight is packed, nor calls of more than two blocks looked at: that takes too long
# On a GPU, of any layer that is given tokens. Not measured. By arithmetic, in tiles of 128 x 256 on 132 multiprocessors: 1024
# rows of a layer with 3072 features make 8 x 12 = 96 tiles, 73% of a round; with 12288, 384 tiles, 97% of three rounds. 2048
# rows of the former fill two rounds to the same 73% and pad twice as much; 512 rows fill one to 36%.
CUDA_ROWS = 1024
# Numbers of rows that may turn out to have a block's bits, on a CPU; a GPU's were not looked at.
CANDIDATES, CONDITIONING_CANDIDATES = (16, 32, 64, 128, 256, 512, 1024), (4, 8, 16, 32, 64)
WIDE_CANDIDATES, WIDEST_CANDIDATES = (64, 128, 256, 512, 1024, 2048), (64, 128, 256, 512)
PADDED = 1.25  # up to this many times the rows that are left are multiplied in one call; else in a full call and a rest
ALIGNMENT = 256  # bytes: cuBLAS chooses by the alignment of pointers too, up to this


class Calls(Enum):
    """How rows are shared out among calls."""

    blocks = "blocks"  # of a constant number of rows, whatever samples they belong to
    samples = "samples"  # one sample a call: for a device whose kernels give a row other bits at another position


_calls = Calls.blocks


@dataclass(frozen=True)
class EqualCalls:
    """What was found to give the bits of a layer's blocks."""

    rows: tuple[int, ...]  # numbers of rows of a call, ascending
    packed: bool = False  # calls of all of these with the weight packed


_equal: dict[tuple[Any, ...], EqualCalls] = {}  # by what calls depend on beside their rows


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


def candidates(out_features: int, in_features: int, *, conditioning: bool, device: str) -> tuple[int, ...]:
    """Numbers of rows beside `block_rows` that are worth a look on a device of this type."""
    if device != "cpu":
        return ()
    if conditioning:
        return CONDITIONING_CANDIDATES
    weights = out_features * in_features
    return CANDIDATES if weights < WIDE else WIDE_CANDIDATES if weights < WIDEST else WIDEST_CANDIDATES


def set_equal_calls(weight: torch.Tensor, equal: EqualCalls, *, conditioning: bool, parts: Sequence[int] = ()) -> None:
    """Of products with a bias and a weight of this shape, in this thread: what `self_check` found.

    Args:
        parts: of a fused weight: the bits are those that its parts have, each multiplied by itself.
    """
    _equal[_kind(weight, conditioning, parts)] = equal


def equal_calls(weight: torch.Tensor, *, conditioning: bool, parts: Sequence[int] = ()) -> EqualCalls | None:
    """What was set; None: nothing was."""
    return _equal.get(_kind(weight, conditioning, parts))


def forget_equal_calls() -> None:
    _equal.clear()


def _kind(weight: torch.Tensor, conditioning: bool, parts: Sequence[int]) -> tuple[Any, ...]:
    threads = torch.get_num_threads(), threads_of_bits()
    return *weight.shape, weight.dtype, weight.device.type, conditioning, *threads, *parts


class PackedWeight:
    """A weight in oneDNN's own layout, from the first product until it is to be forgotten: a second copy."""

    def __init__(self) -> None:
        self._packed: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            self._packed = packed(weight)
        return self._packed

    def forget(self) -> None:
        """To be called when the weight has changed."""
        self._packed = None


def packed(weight: torch.Tensor) -> torch.Tensor:
    """For calls of any number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), NARROW_ROWS)


def may_be_packed(weight: torch.Tensor) -> bool:
    onednn = weight.dtype == torch.bfloat16 or _by_onednn(weight)
    return onednn and weight.device.type == "cpu" and weight.numel() < WIDEST


def exact_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: Sequence[int] | None = None,
    kept: PackedWeight | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias, each row with the same bits whatever other rows there are.

    Args:
        x: [B, S, K], tokens; or [B, K], one conditioning row a sample.
        weight: [N, K].
        bias: [N], or None.
        parts: output features of the projections that a fused weight is made of: each has the bits of a layer that was not
            fused, by a call of its own where `self_check` did not find that one call gives them, since N is part of a call's
            shape too.
        kept: where the layer keeps its packed weight, if it is to be multiplied so and no gradient is wanted.

    Returns:
        [..., N] in x's dtype. Differentiable.
    """
    conditioning = x.dim() == 2
    parts = () if parts is None or len(parts) == 1 else parts
    equal = _equal_calls(weight, bias, conditioning, parts)
    if not equal.rows:
        biases = [None] * len(parts) if bias is None else bias.split(list(parts))
        weights = weight.split(list(parts))
        return torch.cat([exact_linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    cuts = _cuts_by_sample(x) if _calls is Calls.samples else _cuts(len(rows), equal.rows)
    if equal.packed and kept is not None:
        product = _multiply(rows, weight, bias, cuts, kept.of(weight))
    elif len(cuts) == 1 and cuts[0][2] == len(rows) and rows.device.type == "cpu" and not _by_onednn(rows):
        product = _call(rows, weight, bias, None)  # torch's own way back takes no Python
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias)):
        product = cast(torch.Tensor, _Product.apply(rows, weight, bias, cuts))
    else:
        product = _multiply(rows, weight, bias, cuts)
    return product.view(*x.shape[:-1], weight.shape[0])


def _equal_calls(weight: torch.Tensor, bias: torch.Tensor | None, conditioning: bool, parts: Sequence[int]) -> EqualCalls:
    """Which calls may be made; of no number of rows: fused parts need calls of their own."""
    found = None if bias is None or _calls is Calls.samples else equal_calls(weight, conditioning=conditioning, parts=parts)
    if (found and found.rows) or parts:
        return found or EqualCalls(())
    return EqualCalls((block_rows(*weight.shape, conditioning=conditioning, device=weight.device.type),))


Cuts = Sequence[tuple[int, int, int]]  # (first row, row after the last, rows of the call)


def _cuts_by_sample(x: torch.Tensor) -> Cuts:
    sample = 1 if x.dim() == 2 else x.shape[-2]
    number = x.numel() // x.shape[-1]
    return [(start, start + sample, max(sample, CONDITIONING_ROWS)) for start in range(0, number, sample)]


@cache
def _cuts(number: int, sizes: tuple[int, ...]) -> Cuts:
    """Few calls, little padding: the smallest that holds what is left if it is nearly full, else the largest that is full."""
    cuts: list[tuple[int, int, int]] = []
    start = 0
    while start < number:
        left = number - start
        full, enough = [size for size in sizes if size <= left], [size for size in sizes if size >= left]
        call = enough[0] if enough and (not full or enough[0] <= PADDED * left) else full[-1]
        cuts.append((start, min(start + call, number), call))
        start += call
    return cuts


def _multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cuts: Cuts, packed: torch.Tensor | None = None
) -> torch.Tensor:
    if len(cuts) == 1 and cuts[0][2] == len(rows):
        return _call(rows, weight, bias, None, packed)
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    for start, stop, call in cuts:
        portion, place = rows[start:stop], out[start:stop]
        if stop - start == call:
            _call(portion, weight, bias, place, packed)
        else:
            padded = F.pad(portion, (0, 0, 0, call - (stop - start)))
            whole = None if packed is not None else rows.new_empty(call, weight.shape[0])
            place.copy_(_call(padded, weight, bias, whole, packed)[: stop - start])
    return out


def in_calls_of(
    size: int, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """rows [n, K] @ weight.T + bias in calls of `size` rows, whatever the layer's own are. Not differentiable."""
    return _multiply(rows, weight, bias, _cuts(len(rows), (size,)), packed)


def _call(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    if packed is not None or _by_onednn(rows):
        product = onednn(rows, weight if packed is None else packed, bias)
        return product if out is None else out.copy_(product)
    if rows.device.type == "cuda":  # a slice may begin anywhere
        rows, weight, bias = _aligned(rows), _aligned(weight), None if bias is None else _aligned(bias)
        if out is not None and out.data_ptr() % ALIGNMENT:
            return out.copy_(_product(rows, weight, bias, torch.empty_like(out)))
    return _product(rows, weight, bias, out)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Itself, or its copy where a fresh tensor of torch's lies."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


def _by_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN is asked for products of such numbers by name, on both sides, and not torch for its choice."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and float32_by_onednn()


def onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # it reads as many numbers as they lie
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """Forward in calls of constant shape; backward in one call each: no other program has to match it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cuts: Cuts,
    ) -> torch.Tensor:
        of_rows, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return _multiply(rows, weight, bias, cuts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        rows, weight = ctx.saved_tensors
        multiply = onednn if gradient.numel() and _by_onednn(gradient) else F.linear
        of_bias = ctx.needs_input_grad[2]
        return (
            None if weight is None else multiply(gradient, weight.t()),
            None if rows is None else multiply(gradient.t(), rows.t()),
            gradient.sum(0) if of_bias else None,
            None,
        )
