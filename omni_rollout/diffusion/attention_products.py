"""Attention of many tokens as products in float32, for a CPU whose fused kernel is slow.

torch's fused kernel multiplies by MKL, in float32 and in bf16, and MKL leaves half of a CPU unused that Intel did not make
(`machine.float32_by_onednn`). Here oneDNN multiplies, a head of a sample at a time: a call's shape follows from that sample
alone, whatever its company, so its bits do too. Scores and probabilities are float32, the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from omni_rollout.diffusion.machine import float32_by_onednn, on_all_threads
from omni_rollout.diffusion.products import onednn

MANY = 2**16  # scores of a head, from which on it is faster than the kernel
QUERIES = 1024  # at most, that are scored together


def by_products(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether [B, S, H, D] and [B, T, H, D] are taken; by the sizes of a sample, never by how many there are."""
    of_keys = mask is None or (mask.dtype == torch.bool and mask.numel() == key.shape[0] * key.shape[1])
    many = query.shape[1] * key.shape[1] >= MANY
    return many and of_keys and query.device.type == "cpu" and query.shape[2] == key.shape[2] and float32_by_onednn()


def attention_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(query key / sqrt(D)) value.

    Args:
        query: [B, S, H, D], fp32 or bf16.
        key, value: [B, T, H, D].
        mask: bool, B * T elements: keys that are attended to. None: all.

    Returns:
        [B, S, H, D]. Differentiable but for the mask.
    """
    attended = _Attention.apply(query, key, value, mask)
    assert isinstance(attended, torch.Tensor)
    return attended


class _Attention(torch.autograd.Function):
    """The way back makes the probabilities anew: no other program has to match it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        with on_all_threads():
            for sample, bias in enumerate(_biases(key, mask)):
                queries, keys, values = _by_head(query[sample], key[sample], value[sample])
                for head, (rows, of_values) in enumerate(zip(queries, values, strict=True)):
                    place = out[sample, :, head]
                    for part, probabilities in _probabilities(rows, keys[head], bias):
                        place[part] = onednn(probabilities, of_values.t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        for sample, bias in enumerate(_biases(key, mask)):
            queries, keys, values = _by_head(query[sample], key[sample], value[sample])
            (of_out,) = _by_head(gradients[0][sample], scale=1.0)
            for head in range(len(queries)):
                ways_back = _way_back(queries[head], keys[head], values[head], of_out[head], bias)
                for whole, one in zip(found, ways_back, strict=True):
                    whole[sample, :, head] = one
        return *found, None


def _way_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of one head's query, before it was scaled, key and value, from that of its result [S, D]."""
    of_query = torch.empty_like(query)
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    for part, probabilities in _probabilities(query, key, bias):
        rows = gradient[part].contiguous()
        of_probabilities = onednn(rows, value)
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, torch.float32)
        of_query[part] = onednn(of_scores, key.t())
        of_key += onednn(of_scores.t(), query[part].t())
        of_value += onednn(probabilities.t(), rows.t())
    return of_query * key.shape[-1] ** -0.5, of_key, of_value


def _biases(key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: what is added to the scores of every key; also where nothing is masked, so that all calls are of one kind."""
    biases = key.new_zeros(key.shape[:2], dtype=torch.float32)
    return biases if mask is None else biases.masked_fill_(~mask.reshape(biases.shape), -torch.inf)


def _by_head(*parts: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, ...]:
    """Of [S, H, D] each: [H, S, D] float32, a head after the other in memory; the first one times `scale`, 1 / sqrt(D)."""
    heads = [part.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True) for part in parts]
    heads[0].mul_(parts[0].shape[-1] ** -0.5 if scale is None else scale)
    return tuple(heads)


def _probabilities(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Of one head, in portions as equal as may be: which queries, and [portion, T]."""
    portion = -(-len(query) // -(-len(query) // QUERIES))
    for start in range(0, len(query), portion):
        part = slice(start, start + portion)
        yield part, torch.softmax(onednn(query[part], key, bias), dim=-1)
