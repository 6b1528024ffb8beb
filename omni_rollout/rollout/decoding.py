"""Finished latents become media beside the denoising loop, so that no image waits until another one is decoded.

A convolution's bits depend on how many images it is given, not on which. So those of one size are decoded by a constant number,
whatever has finished by then; a batch that nothing more will join is filled up with copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from omni_rollout.models import family_module
from omni_rollout.models.base.sizes import decode_rows
from omni_rollout.types import Layout, RolloutRequest, SamplingSpec

Decode = Callable[[torch.Tensor, SamplingSpec], torch.Tensor]  # [B, *shape] fp32 -> uint8 [B, *media]


class Decoder:
    """Of one engine. What it is told to `expect` must be told to `add`, finished or not."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._left: Counter[tuple[object, ...]] = Counter()
        self._waiting: dict[tuple[object, ...], list[tuple[RolloutRequest, Any]]] = defaultdict(list)

    def expect(self, request: RolloutRequest) -> None:
        self._left[_key(request.spec)] += 1

    def add(self, request: RolloutRequest, record: dict[str, Any] | None) -> Iterator[tuple[RolloutRequest, Any, np.ndarray]]:
        """What can be decoded now that this one has finished; `record` holds its `final_latents`, None: it failed.

        Raises:
            DecodeError: from whatever the VAE raised, for all images of that batch; the next may be asked for.
        """
        key = _key(request.spec)
        self._left[key] -= 1
        waiting = self._waiting[key]
        if record is not None:
            waiting.append((request, record))
        rows = decode_rows(_layout(request.spec))
        if not self._left[key]:
            del self._left[key]
        if waiting and (len(waiting) == rows or key not in self._left):
            del self._waiting[key]
            yield from self._batch(waiting, rows)

    @property
    def waits(self) -> bool:
        return any(self._waiting.values())

    def rest(self) -> Iterator[tuple[RolloutRequest, Any, np.ndarray]]:
        """A batch of what has finished and waits for others, where none will come. Raises DecodeError, as `add` does."""
        members = self._waiting.pop(next(key for key, members in self._waiting.items() if members))
        yield from self._batch(members, decode_rows(_layout(members[0][0].spec)))

    def _batch(self, members: list[tuple[RolloutRequest, Any]], rows: int) -> Iterator[tuple[RolloutRequest, Any, np.ndarray]]:
        latents = [record["final_latents"] for _, record in members]
        latents += latents[-1:] * (rows - len(latents))
        try:
            with torch.inference_mode():
                media = self._decode(torch.cat(latents), members[0][0].spec).cpu().numpy()
        except Exception as error:
            raise DecodeError(members) from error
        for (request, record), one in zip(members, media, strict=False):
            yield request, record, one.copy()


class DecodeError(RuntimeError):
    def __init__(self, members: list[tuple[RolloutRequest, Any]]) -> None:
        super().__init__(f"decoding the latents of {', '.join(request.request_id for request, _ in members)} failed")
        self.records = [record for _, record in members]


def _key(spec: SamplingSpec) -> tuple[object, ...]:
    return spec.family, _layout(spec).media


def _layout(spec: SamplingSpec) -> Layout:
    return family_module(spec.family, "spec").layout(spec)
