"""What all addresses of one server share."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import Request

from omni_rollout.config import TrainConfig
from omni_rollout.rollout.serve.asked import Batch, Reader
from omni_rollout.rollout.serve.errors import BadRequest, error_of
from omni_rollout.rollout.serve.host import Host
from omni_rollout.rollout.serve.metrics import Metrics
from omni_rollout.rollout.serve.shared import SharedFolder
from omni_rollout.types import Trajectory

LOOK_SECONDS = 0.2  # between looks at whether a client is still there


class Server:
    """The engine's host, its settings, and what it shares and counts."""

    def __init__(self, config: TrainConfig, host: Host, reader: Reader) -> None:
        self.config, self.limits, self.host, self.reader = config, config.serve, host, reader
        self.shared, self.metrics = SharedFolder(), Metrics(host)
        self.draining = False

    @property
    def model(self) -> str:
        """What answers call it: a hub id, or the end of its path."""
        return "/".join(Path(self.config.model.path).parts[-2:])

    def check_open(self, images: int) -> None:
        """Raises BadRequest: 503 where nothing can be sampled, 429 where too much waits already."""
        if self.host.failure is not None or self.host.broken:
            why = "the engine is lost" if self.host.failure is not None else "the engine holds broken weights: send all again"
            raise BadRequest(f"{why}", status=503, kind="engine_error")
        if self.draining:
            raise BadRequest("this server is being drained; ask another", status=503, kind="draining_error")
        if self.host.asked + images > self.limits.max_waiting:
            raise BadRequest(
                f"{self.host.asked} images are asked for already, this server lets {self.limits.max_waiting} wait "
                "(serve.max_waiting); ask again later",
                "max_waiting",
                status=429,
                kind="rate_limit_error",
            )

    async def all_of(self, request: Request, batch: Batch) -> list[Trajectory]:
        """In their order. A client that goes away frees its places.

        Raises:
            BadRequest: what kept the first from being made.
        """
        made: dict[int, Trajectory] = {}
        try:
            with self.host.work(batch.requests, None) as work, self.metrics.watching(batch.requests) as watch:
                while len(made) < len(batch.requests):
                    try:
                        results = await asyncio.wait_for(work.results(), LOOK_SECONDS)
                    except TimeoutError:
                        if await request.is_disconnected():
                            raise BadRequest("the client has gone", status=499, kind="client_gone") from None
                        continue
                    for index, result in results:
                        watch(index, result)
                        if isinstance(result, Exception):
                            raise error_of(result)
                        made[index] = result
        finally:
            self.reader.release(batch)
        return [made[index] for index in range(len(batch.requests))]

    def about(self) -> dict[str, Any]:
        """What a trainer must know before it uses this server."""
        engine, model = self.host.engine, self.config.model
        return {
            "family": model.family,
            "dtype": model.dtype.value,
            "parity": self.config.parity.value,
            "policy_version": engine.policy_version,
            "weights": engine.weights_digest,
            "machine": engine.machine,
            "max_requests": self.limits.max_requests,
            "max_body_bytes": self.limits.max_body_mb << 20,
            "shared_memory": str(self.shared.folder) if self.shared.folder is not None else None,
        }
