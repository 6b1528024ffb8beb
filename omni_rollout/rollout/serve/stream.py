"""The answer of `/v1/rollouts`, as it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from omni_rollout.rollout.serve.asked import SHARED, Batch
from omni_rollout.rollout.serve.errors import error_of
from omni_rollout.rollout.serve.state import Server
from omni_rollout.rollout.serve.wire import ALIVE_SECONDS, FRAMES, echo, frame
from omni_rollout.trajectories.capsule import packed, serialized
from omni_rollout.types import Trajectory

SMALL_BYTES = 1 << 20  # of latents and media: packed in a millisecond or two
FETCH_SECONDS = 0.005  # between looks at whether a client has fetched what lies in shared memory


class Answer(StreamingResponse):
    """Frames, as the images finish. However it ends, its places, its pictures and its shared memory are freed."""

    def __init__(self, server: Server, batch: Batch, weights: str | None, shared_from: int | None) -> None:
        super().__init__(self._frames(), media_type=FRAMES)
        self._server, self._batch, self._shared_from = server, batch, shared_from
        self._work = server.host.work(batch.requests, weights)
        self._files: list[Path] = []
        self._gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._work, self._server.metrics.watching(self._batch.requests) as self._watch:
                await super().__call__(scope, receive, send)
        finally:  # nothing is awaited here: the client may have gone
            self._gone = True
            self._server.reader.release(self._batch)
            for path in self._files:
                path.unlink(missing_ok=True)

    async def _frames(self) -> AsyncIterator[bytes]:
        requests = self._batch.requests
        yield b"".join(frame({"type": "accepted", "requests": [echo(request) for request in requests]}))
        left = len(requests)
        while left:
            try:
                results = await asyncio.wait_for(self._work.results(), ALIVE_SECONDS)
            except TimeoutError:
                yield b"".join(frame({"type": "alive"}))
                continue
            left -= len(results)
            small: list[bytes] = []
            for result in results:
                self._watch(*result)
                if _is_small(result[1]):  # another thread would take longer to wake than it has to do
                    small += self._framed(*result)
                else:
                    for part in await asyncio.to_thread(self._framed, *result):
                        yield part
            if small:
                yield b"".join(small)
        while any(path.exists() for path in self._files):  # until the client has mapped the last, or is gone
            await asyncio.sleep(FETCH_SECONDS)
        yield b"".join(frame({"type": "end"}))

    def _framed(self, index: int, result: Trajectory | Exception) -> list[bytes]:
        if isinstance(result, Exception):
            return frame({"type": "error", "index": index, "error": error_of(result).to_json()})
        images = tuple(replace(image, path=SHARED + image.sha256) for image in result.prompt.images)  # no path of this machine
        trajectory = replace(result, prompt=replace(result.prompt, images=images)) if images else result
        head: dict[str, Any] = {"type": "trajectory", "index": index}
        try:
            tensors, header = packed(trajectory, result.request_id)
        except ValueError as error:  # numbers that overflowed, in this one alone
            return frame({"type": "error", "index": index, "error": error_of(error).to_json()})

        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._shared_from is not None and size >= self._shared_from:
            name = self._put(tensors, header)
            if name is not None:
                return frame({**head, "shared": name})
        return frame(head, serialized(tensors, header))

    def _put(self, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str | None:
        """The name in shared memory; None: there is no room."""
        path = self._server.shared.new()
        self._files.append(path)
        try:
            safetensors.torch.save_file(tensors, path, metadata=header)
        except (OSError, safetensors.SafetensorError):
            path.unlink(missing_ok=True)
            return None
        if self._gone:  # while this thread wrote it: nobody else will remove it
            path.unlink(missing_ok=True)
        return path.name


def _is_small(result: Trajectory | Exception) -> bool:
    return isinstance(result, Exception) or result.latents.nbytes + result.media.nbytes < SMALL_BYTES
