"""Proves on the device at hand, before the first rollout, that a row's bits do not depend on its company.

For each distinct layer of the loaded model: the same rows alone, in company, at other positions, beside padding; likewise
attention, norms and activations. The results' digest tells two machines apart, or shows that they compute the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from omni_rollout.diffusion import products
from omni_rollout.diffusion.activations import exact_gelu, exact_silu
from omni_rollout.diffusion.attention import exact_attention
from omni_rollout.diffusion.attention_products import by_products
from omni_rollout.diffusion.exact_ops import HasEffectiveWeight
from omni_rollout.diffusion.machine import check_workspace, machine
from omni_rollout.diffusion.products import Calls, EqualCalls, block_rows, exact_linear, in_calls_of, may_be_packed, packed
from omni_rollout.errors import PinnedKnobError

_POOL = 100_003  # different numbers that the inputs are made of
_PLACED = 4  # rows that are multiplied at every place of a block
_MANY = 1024  # rows; where there are more, calls of few are compared over half as many
_MOVED = 5  # places that they are moved by when calls of another kind are compared with a block
_TOKENS, _MANY_TOKENS = 77, 277  # a sample, where attention, norms and activations are checked
_checked: dict[tuple[Any, ...], Checked] = {}
Threads = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Layer:
    """A product of the model: [rows, in_features] x [in_features, out_features]."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Checked:
    calls: str  # how rows are shared out among calls, in words
    kernels: str  # digest of what the checks computed: equal digests, equal kernels


def linear_layers(module: nn.Module) -> Iterator[Layer]:
    """The trainer's layers below `module`."""
    for name, layer in module.named_modules():
        if isinstance(layer, HasEffectiveWeight) and isinstance(layer, nn.Module):
            dense: Any = layer
            yield Layer(name, dense.out_features, dense.in_features)


def attention_shape(policy: nn.Module) -> tuple[int, int]:
    """(heads, channels of a head) of a diffusers transformer."""
    config: Any = next(module.config for module in policy.modules() if hasattr(module, "config"))
    return config.num_attention_heads, config.attention_head_dim


def checker(policy: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[], dict[str, Any]]:
    """`self_check` of what the trainer's `policy` is made of now, for whenever it is asked for."""
    heads, head_dim = attention_shape(policy)
    return partial(self_check, list(linear_layers(policy)), heads=heads, head_dim=head_dim, dtype=dtype, device=device)


def self_check(
    layers: Iterable[Layer], *, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """`machine(device)` with `calls` and `kernels`; sets how this process multiplies from now on (`products.set_calls`).

    Blocks of constant shape are tried first, then one sample a call.

    Raises:
        PinnedKnobError: neither is exact here; names the layer or the operator. Or what was to be set before CUDA started.
    """
    check_workspace(device)
    distinct = {(layer.out_features, layer.in_features): layer for layer in layers}
    here = machine(device)
    key = (*sorted(distinct), heads, head_dim, dtype, *(str(value) for value in here.values()))
    if key not in _checked:
        _checked[key] = _find_calls([distinct[shape] for shape in sorted(distinct)], heads, head_dim, dtype, device)
    checked = _checked[key]
    products.set_calls(Calls.samples if checked.calls == Calls.samples.value else Calls.blocks)
    return {**here, "calls": checked.calls, "kernels": checked.kernels}


@torch.no_grad()
def _find_calls(layers: list[Layer], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Checked:
    digest = hashlib.sha256()
    values = Values(dtype, device)
    products.set_calls(Calls.blocks)
    failed = _first_inexact(layers, values, digest)
    if failed is not None:
        digest = hashlib.sha256()
        products.set_calls(Calls.samples)
        failed = _first_inexact(layers, values, digest)
    if failed is not None:
        raise PinnedKnobError(
            f"parity=exact cannot be had on this {device.type}: a row of layer {failed.name} ({failed.in_features} -> "
            f"{failed.out_features}, {dtype}) has other bits in other company, even with one sample a call; "
            "choose parity=fast and watch parity/ppo_kl_mb0, or another device, dtype or build of torch"
        )
    for name, function, sample in operators(values, heads, head_dim):
        if not _exact(function, sample, digest):
            raise PinnedKnobError(
                f"parity=exact cannot be had on this {device.type}: {name} gives a sample other bits in other company "
                f"({dtype}, {heads} heads of {head_dim}); choose parity=fast and watch parity/ppo_kl_mb0, or another device"
            )
    if products.calls() is Calls.samples:
        return Checked(Calls.samples.value, digest.hexdigest())
    sizes = {block_rows(layer.out_features, layer.in_features, conditioning=False, device=device.type) for layer in layers}
    rows = [products.CONDITIONING_ROWS, *sorted(sizes)]
    return Checked(f"blocks of {', '.join(map(str, rows))} rows", digest.hexdigest())


def _first_inexact(layers: list[Layer], values: Values, digest: Any) -> Layer | None:
    for layer in layers:
        weight = values(layer.out_features, layer.in_features)
        bias = values(layer.out_features)

        def product(x: torch.Tensor, weight: torch.Tensor = weight, bias: torch.Tensor = bias) -> torch.Tensor:
            return exact_linear(x, weight, bias)

        rows = block_rows(layer.out_features, layer.in_features, conditioning=False, device=values.device.type)
        tokens = rows // 2 + 13  # cuts across blocks
        for shape in ((3, tokens, layer.in_features), (5, layer.in_features)):
            if not _exact(product, values(*shape), digest) or not _exact_to_the_rounding(layer, shape, values, digest):
                return layer
            if products.calls() is Calls.blocks and not find_equal_calls(layer, values, conditioning=len(shape) == 2):
                return layer
    return None


def _exact_to_the_rounding(layer: Layer, shape: tuple[int, ...], values: Values, digest: Any) -> bool:
    """As `_exact`, and in blocks at every place, of sums of which nothing but their rounding is left."""
    numbers = torch.Size(shape[:-1]).numel()
    x, weight, bias = values.cancelling(numbers, layer.out_features, layer.in_features)
    if not _exact(lambda part: exact_linear(part, weight, bias), x.view(shape), digest):
        return False
    if products.calls() is Calls.samples:
        return True
    conditioning = len(shape) == 2
    block = block_rows(*weight.shape, conditioning=conditioning, device=values.device.type)
    for row in x[:_PLACED]:
        everywhere = in_calls_of(block, row.expand(block, -1).contiguous(), weight, bias)
        if not torch.equal(everywhere, everywhere[:1].expand_as(everywhere)):
            return False
    return True


def find_equal_calls(layer: Layer, values: Values, *, conditioning: bool, on: Threads = nullcontext) -> bool:
    """Which numbers of rows give the bits of this layer's blocks, in every row and wherever it stands; packed or not.

    Args:
        on: where those calls are made; the blocks are multiplied outside of it.

    Returns:
        Whether calls of as many rows as the blocks are among them.
    """
    device, shape = values.device.type, (layer.out_features, layer.in_features)
    block = block_rows(*shape, conditioning=conditioning, device=device)
    others = products.candidates(*shape, conditioning=conditioning, device=device)
    if not others:
        return True
    x, weight, bias = values.cancelling(max(others), *shape)
    expected = in_calls_of(block, x, weight, bias)
    with on():
        found = _equal_calls({block, *others}, x, weight, bias, expected)
        products.set_equal_calls(weight, found, conditioning=conditioning)
    return block in found.rows


def _equal_calls(
    sizes: Iterable[int], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, expected: torch.Tensor
) -> EqualCalls:
    moved, expected = x.roll(_MOVED, 0), expected.roll(_MOVED, 0)

    def are_equal(rows: int, with_weight: torch.Tensor | None = None) -> bool:
        looked_at = len(moved) if len(moved) <= _MANY else max(rows, _MANY // 2)  # all places of a call at least
        return torch.equal(in_calls_of(rows, moved[:looked_at], weight, bias, with_weight), expected[:looked_at])

    equal = tuple(rows for rows in sorted(sizes) if are_equal(rows))
    if not equal or not may_be_packed(weight):
        return EqualCalls(equal)
    try:
        one = packed(weight)
        return EqualCalls(equal, packed=all(are_equal(rows, one) for rows in equal))
    except RuntimeError:  # oneDNN has no such product with the instructions that it may use
        return EqualCalls(equal)


@torch.no_grad()
def find_fused(
    parts: Sequence[int], in_features: int, *, dtype: torch.dtype, device: torch.device, on: Threads = nullcontext
) -> None:
    """After `self_check` of a fused layer's parts: numbers of rows for which one call gives the bits that the parts have.

    Where there are none, each part is multiplied by itself. `on`: as in `find_equal_calls`.
    """
    values = Values(dtype, device)
    weight = values(sum(parts), in_features)
    with on():
        of_a_part = products.equal_calls(weight[: parts[0]], conditioning=False)
        if of_a_part is None or products.equal_calls(weight, conditioning=False, parts=parts) is not None:
            return
    x, weight, bias = values.cancelling(max(of_a_part.rows), sum(parts), in_features)
    expected = exact_linear(x[None], weight, bias, parts)[0]
    with on():
        found = _equal_calls(of_a_part.rows, x, weight, bias, expected)
        products.set_equal_calls(weight, found, conditioning=False, parts=parts)


def operators(values: Values, heads: int, head_dim: int) -> Iterator[tuple[str, Callable[..., torch.Tensor], torch.Tensor]]:
    width = heads * head_dim
    mask = (torch.arange(_TOKENS, device=values.device) % 7 != 3)[None, None, None]

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    def attention(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (heads, head_dim)) for part in x.chunk(3, dim=-1))
        return exact_attention(sdpa, query, key, value, mask)

    joint = values(3, _TOKENS, 3 * width) / 64
    yield "attention", attention, _cancelling_tokens(joint)
    yield "attention with a mask", lambda x: attention(x, mask.expand(len(x), -1, -1, -1)), joint
    many = values(3, _MANY_TOKENS, 3 * width) / 64
    alike = many[..., :width].unflatten(-1, (heads, head_dim))
    if by_products(alike, alike, None):
        yield "attention of many tokens", attention, _cancelling_tokens(many)
    states = values(3, _TOKENS, width)
    yield "layer_norm", lambda x: F.layer_norm(x.float(), (width,)), states  # before bf16 hides what differs
    yield "rms_norm", lambda x: F.rms_norm(x.unflatten(-1, (heads, head_dim)), (head_dim,)), states
    yield "gelu", exact_gelu, values(3, _TOKENS, 4 * width + 1) / 8
    yield "silu", exact_silu, values(3, width + 1) / 8


def _cancelling_tokens(joint: torch.Tensor) -> torch.Tensor:
    """Query, key and value, [B, S, 3 C], such that what a token attends to is 0 but for rounding: see `Values.cancelling`."""
    query, key, value = joint.chunk(3, dim=-1)
    half = joint.shape[1] // 2
    rest = torch.zeros_like(key[:, 2 * half :])
    key = torch.cat([key[:, :half], key[:, :half].flip(1), rest], dim=1)
    value = torch.cat([value[:, :half], -value[:, :half].flip(1), rest], dim=1)
    return torch.cat([query, key, value], dim=-1)


def _exact(function: Callable[[torch.Tensor], torch.Tensor], samples: torch.Tensor, digest: Any) -> bool:
    """Whether each sample has the same bits alone, at another place, and beside zeros. Digests the result."""
    together = function(samples)
    digest.update(together.contiguous().cpu().view(torch.uint8).numpy().data)
    order = torch.arange(len(samples), device=samples.device).roll(1)
    if not torch.equal(function(samples[order]), together[order]):
        return False
    beside_zeros = torch.cat([torch.zeros_like(samples[:2]), samples[:1]])
    alone = (function(sample[None])[0] for sample in samples)
    return torch.equal(function(beside_zeros)[-1], together[0]) and all(map(torch.equal, alone, together))


class Values:
    """Tensors of full mantissas and many magnitudes, the same on every machine: sums of their products have to round."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        generator = torch.Generator().manual_seed(0)
        powers = torch.tensor([2.0**power for power in range(-4, 3)])
        signed = torch.randint(-127, 128, (_POOL,), generator=generator) / 3
        self._pool = (signed * powers[torch.randint(len(powers), (_POOL,), generator=generator)]).to(dtype)

    def cancelling(self, rows: int, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [rows, in_features], weight and bias of which every product is 0 in exact arithmetic.

        What is left of each is how the sum was rounded on its way, and so in which order: where one kernel differs from
        another, most elements show it. Of sums as they come bf16 shows one in some thousand.
        """
        half = in_features // 2
        order = torch.arange(half, device=self.device).flip(0).roll(half // 3)
        x, weight = self(rows, half), self(out_features, half)
        odd = (0, in_features % 2)
        x, weight = torch.cat([x, -x[:, order]], dim=1), torch.cat([weight, weight[:, order]], dim=1)
        return F.pad(x, odd), F.pad(weight, odd), self(out_features) * 0

    def __call__(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return self._pool.repeat(-(-count // _POOL))[:count].view(shape).to(self.device)
