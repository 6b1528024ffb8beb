"""Finished latents become media beside the denoising loop, so that no image waits until another one is decoded.

A convolution's bits depend on how many images it is given, not on which. So those of one size are decoded by a constant number,
whatever has finished by then; a batch that nothing more will join is filled up with copies. On a CPU a batch of small ones is
decoded by one thread, batches beside each other: of work so small two threads make little more than one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import torch

from omni_rollout.diffusion.host import let_helpers_go
from omni_rollout.diffusion.machine import pin_thread
from omni_rollout.models import family_module
from omni_rollout.models.base.sizes import decode_rows, is_small
from omni_rollout.types import Layout, RolloutRequest, SamplingSpec

Decode = Callable[[torch.Tensor, SamplingSpec], torch.Tensor]  # [B, *shape] fp32 -> uint8 [B, *media]
Batch = list[tuple[RolloutRequest, dict[str, Any]]]  # with their records
Deliver = Callable[[RolloutRequest, dict[str, Any], "np.ndarray | DecodeError"], None]


BESIDE = 4  # batches at most: each takes memory of its own


class Decoder:
    """Of one engine, in the thread of its loop. What it is told to `expect` must be told to `add`, finished or not.

    Args:
        decode: may be called by several threads at a time.
        deliver: told, in the loop, of each image with its record; in the order in which batches were full.
        threads: that may decode; one for a GPU's.
    """

    def __init__(self, decode: Decode, deliver: Deliver, loop: asyncio.AbstractEventLoop, threads: int = 1) -> None:
        self._decode, self._deliver, self._loop, self._threads = decode, deliver, loop, threads
        self._pool = ThreadPoolExecutor(min(threads, BESIDE), thread_name_prefix="decoder")
        self._all_threads = Lock()
        self._left: Counter[tuple[object, ...]] = Counter()
        self._waiting: dict[tuple[object, ...], Batch] = defaultdict(list)
        self._started: deque[tuple[asyncio.Future[np.ndarray], Batch]] = deque()

    @property
    def busy(self) -> list[asyncio.Future[np.ndarray]]:
        return [future for future, _ in self._started]

    def expect(self, request: RolloutRequest) -> None:
        self._left[_key(request.spec)] += 1

    def add(self, request: RolloutRequest, record: dict[str, Any] | None) -> None:
        """One that has finished; `record` holds its `final_latents`. None: it failed."""
        key = _key(request.spec)
        self._left[key] -= 1
        waiting = self._waiting[key]
        if record is not None:
            waiting.append((request, record))
        if not self._left[key]:
            del self._left[key]
        if waiting and (len(waiting) == decode_rows(_layout(request.spec)) or key not in self._left):
            self._start(self._waiting.pop(key))

    def finish(self) -> None:
        """Decodes what waits for others of its size, where none will come, and delivers all."""
        for batch in self._waiting.values():
            if batch:
                self._start(batch)
        self._waiting.clear()
        if self._started:
            self._loop.run_until_complete(asyncio.wait(self.busy))
            self._hand_over()

    def close(self) -> None:
        self._pool.shutdown()

    def _start(self, batch: Batch) -> None:
        future = self._loop.run_in_executor(self._pool, self._media, batch)
        self._started.append((future, batch))
        future.add_done_callback(self._hand_over)

    def _hand_over(self, _: object = None) -> None:
        while self._started and self._started[0][0].done():
            future, batch = self._started.popleft()
            error = future.exception()
            if error is not None:
                failed = DecodeError(batch)
                failed.__cause__ = error
            for place, (request, record) in enumerate(batch):
                try:
                    self._deliver(request, record, failed if error is not None else future.result()[place].copy())
                except Exception as refused:  # the others are delivered all the same
                    message = f"{request.request_id} was decoded, and nobody took it"
                    self._loop.call_exception_handler({"message": message, "exception": refused})

    def _media(self, batch: Batch) -> np.ndarray:
        spec = batch[0][0].spec
        layout = _layout(spec)
        rows = decode_rows(layout)
        latents = [record["final_latents"] for _, record in batch]
        latents += latents[-1:] * (rows - len(latents))
        with torch.inference_mode():
            return (self._small if is_small(layout) else self._large)(torch.cat(latents), spec)

    def _small(self, latents: torch.Tensor, spec: SamplingSpec) -> np.ndarray:
        pin_thread(1)
        return self._decode(latents, spec).cpu().numpy()

    def _large(self, latents: torch.Tensor, spec: SamplingSpec) -> np.ndarray:
        with self._all_threads:
            pin_thread(self._threads)
            media = self._decode(latents, spec).cpu().numpy()
            let_helpers_go()
            return media


class DecodeError(RuntimeError):
    """Of all images of a batch; its cause is whatever the VAE raised."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(f"decoding the latents of {', '.join(request.request_id for request, _ in batch)} failed")


def _key(spec: SamplingSpec) -> tuple[object, ...]:
    return spec.family, _layout(spec).media


def _layout(spec: SamplingSpec) -> Layout:
    return family_module(spec.family, "spec").layout(spec)
