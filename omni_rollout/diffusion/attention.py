"""Attention of each sample by itself where its company would choose the kernel's division of labour.

On a GPU the flash kernel shares the keys out among multiprocessors when batch x heads x blocks of queries are too few to fill
them, and adds up the parts: one image alone may have other bits than among eight. A call of one sample has a constant shape,
whatever the batch. A CPU's kernel gives every head of every sample its own work, and one call serves all (`self_check`); where
it is slow, many tokens are attended to by products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from omni_rollout.diffusion.attention_products import attention_by_products, by_products

BY_SAMPLE = {"cuda"}  # types of devices

# (query, key, value: [B, S, H, D]; mask: bool [B, ...] or None) -> [B, S, H, D]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def exact_attention(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`attention` of all samples, in the calls that are exact on their device, or its like in products."""
    if by_products(query, key, mask):
        return attention_by_products(query, key, value, mask)
    if query.device.type not in BY_SAMPLE or len(query) == 1:
        return attention(query, key, value, mask)
    samples = (slice(row, row + 1) for row in range(len(query)))
    return torch.cat([attention(query[s], key[s], value[s], None if mask is None else mask[s]) for s in samples])
