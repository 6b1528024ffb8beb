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
COPIED = 2**22  # numbers of query, key and value, unless a head has more
TOGETHER = 2**20  # scores of a head, at most, that are made at a time
FEW = 64  # queries, which are scored together however many keys there are


def by_products(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether [B, S, H, D] and [B, T, H, D] are taken; by the sizes of a sample, never by how many there are."""
    known = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16) and query.shape[2:] == key.shape[2:]
    of_keys = mask is None or (mask.dtype == torch.bool and len(mask) == len(key) and mask.numel() == key[..., 0, 0].numel())
    return query.shape[1] * key.shape[1] >= MANY and known and of_keys and float32_by_onednn()


def attention_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(query key / sqrt(D)) value.

    Args:
        query: [B, S, H, D], fp32 or bf16.
        key, value: [B, T, H, D].
        mask: bool, [B, ...] with B * T elements: keys that are attended to, at least one a sample. None: all.

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
        biases = _biases(key, mask)
        with on_all_threads():
            for sample, heads in _groups(query, key):
                queries, keys, values = (_by_head(x[sample, :, heads]) for x in (query, key, value))
                for head, place in enumerate(out[sample, :, heads].unbind(1)):
                    for part, probabilities in _probabilities(queries[head], keys[head], biases[sample]):
                        place[part] = onednn(probabilities, values[head].t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        biases = _biases(key, mask)
        for sample, heads in _groups(query, key):
            queries, keys, values, of_out = (_by_head(x[sample, :, heads]) for x in (query, key, value, gradients[0]))
            places = zip(*(x[sample, :, heads].unbind(1) for x in found), strict=True)
            for head, of_head in enumerate(places):
                ways_back = _way_back(queries[head], keys[head], values[head], of_out[head], biases[sample])
                for place, one in zip(of_head, ways_back, strict=True):
                    place.copy_(one)
        return *found, None


def _way_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of one head's query, key and value, from that of its result: [S, D] or [T, D] each."""
    of_query = torch.empty_like(query)
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    for part, probabilities in _probabilities(query, key, bias):
        rows = gradient[part].contiguous()
        of_probabilities = onednn(rows, value)
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, torch.float32)
        of_query[part] = onednn(of_scores, key.t())
        of_key += onednn(of_scores.t(), query[part].t())
        of_value += onednn(probabilities.t(), rows.t())
    scale = query.shape[-1] ** -0.5
    return of_query * scale, of_key * scale, of_value


def _biases(key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: what is added to the scores of every key; also where nothing is masked, so that all calls are of one kind."""
    biases = key.new_zeros(key.shape[:2], dtype=torch.float32)
    return biases if mask is None else biases.masked_fill_(~mask.reshape(biases.shape), -torch.inf)


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Samples and heads that have float32 copies at a time."""
    several = max(1, COPIED // ((query.shape[1] + 2 * key.shape[1]) * query.shape[3]))
    for sample in range(len(query)):
        yield from ((sample, slice(start, start + several)) for start in range(0, query.shape[2], several))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[S, H, D] -> [H, S, D] float32, a head after the other in memory."""
    return x.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _probabilities(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Of one head, in portions as equal as may be: which queries, and [portion, T]."""
    scale, most = query.shape[-1] ** -0.5, max(FEW, TOGETHER // len(key))
    portion = -(-len(query) // -(-len(query) // most))
    for start in range(0, len(query), portion):
        part = slice(start, start + portion)
        yield part, torch.softmax(onednn(query[part] * scale, key, bias), dim=-1)
