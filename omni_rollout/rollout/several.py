"""Several servers as one engine: the Dispatcher says which samples what, and which next when one is lost.

requests ─► Dispatcher ─► chunks ─► a thread for each server ─► RemoteEngine.generate ─► yielded
                ▲                        │ it is lost: its requests go to others; it is given the weights when it is back
                └────────────────────────┘
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from omni_rollout.errors import EngineDiedError, EngineHungError, UserError
from omni_rollout.rollout.adapter import Adapter
from omni_rollout.rollout.delivery import OnError, delivered
from omni_rollout.rollout.dispatch import Dispatcher
from omni_rollout.rollout.guards import check_distinct
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.types import RolloutRequest, Trajectory

Event = tuple[int, str, RolloutRequest | None, Any]  # server, what, of which request, with what


class RemoteEngines:
    """With `RolloutEngine`'s interface.

    Args:
        urls: of servers with one model and machines of one kind.
        max_num_seqs: requests that each denoises together.

    Raises:
        UserError: nobody answers at one of them, or they differ.
    """

    def __init__(self, urls: Sequence[str], token: str | None = None, *, max_num_seqs: int = 8) -> None:
        self._max_num_seqs = max_num_seqs
        self._engines: list[RemoteEngine] = []
        try:
            for url in urls:
                self._engines.append(RemoteEngine(url, token, waits=False))
            first = self._engines[0]
            for engine, url in zip(self._engines, urls, strict=True):
                for name in ("family", "dtype", "parity", "machine", "weights"):
                    if engine.about[name] != first.about[name]:
                        raise UserError(f"{url}: {name} {engine.about[name]}, at {urls[0]} {first.about[name]}")
        except BaseException:
            self.close()
            raise
        self.about, self.machine = first.about, first.machine
        self._lost: set[int] = set()

    @property
    def policy_version(self) -> int:
        return self._engines[0].policy_version

    @property
    def weights_digest(self) -> str:
        return self._engines[0].weights_digest

    def generate(
        self, requests: Iterable[RolloutRequest], on_error: OnError | None = None, *, timeout: float | None = None
    ) -> Iterator[Trajectory]:
        """As `RolloutEngine.generate`. Raises EngineHungError: no server made an image for `timeout` seconds."""
        requests = list(requests)
        check_distinct(requests)
        run = _Run(self._engines, requests, self._max_num_seqs, timeout)
        try:
            yield from delivered(run.results(), len(requests), on_error)
        finally:
            run.stop()

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int, adapter: Adapter | None = None) -> str:
        """On every server, as on one; one that is lost gets them when it is back."""
        tensors = dict(named)
        return next(iter([engine.update_weights(tensors.items(), version, adapter) for engine in self._engines]))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> RemoteEngines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One call of `generate`."""

    def __init__(
        self, engines: Sequence[RemoteEngine], requests: Sequence[RolloutRequest], max_num_seqs: int, timeout: float | None
    ) -> None:
        self._engines, self._timeout = engines, timeout
        self._requests = {request.request_id: request for request in requests}
        self._dispatcher = Dispatcher(requests, range(len(engines)), max_num_seqs)
        self._events: queue.Queue[Event] = queue.Queue()
        self._chunks: list[queue.Queue[list[RolloutRequest] | None]] = [queue.Queue() for _ in engines]
        self._stopped = threading.Event()
        for server in range(len(engines)):
            threading.Thread(target=self._serve, args=(server,), name=f"server {server}", daemon=True).start()

    def results(self) -> Iterator[tuple[RolloutRequest, Trajectory | Exception]]:
        self._send()
        while not self._dispatcher.done:
            try:
                server, what, request, result = self._events.get(timeout=self._timeout)
            except queue.Empty:
                raise EngineHungError(f"no image from any server for {self._timeout:g} s (rollout.timeout)") from None
            if what == "made" and request is not None and self._dispatcher.finished(server, request.request_id):
                yield request, result
            elif what == "lost":
                self._dispatcher.died(server)
            elif what == "back":
                self._dispatcher.back(server)
            elif what == "failed":
                raise result
            self._send()
        for request in self._dispatcher.given_up:
            yield request, EngineDiedError(f"request {request.request_id}: every server that was at it was lost")

    def stop(self) -> None:
        self._stopped.set()
        for chunks in self._chunks:
            chunks.put(None)

    def _send(self) -> None:
        for server, chunk in self._dispatcher.assign():
            self._chunks[server].put(chunk)

    def _serve(self, server: int) -> None:
        engine, chunks = self._engines[server], self._chunks[server]
        while (chunk := chunks.get()) is not None and not self._stopped.is_set():
            try:
                failed: list[tuple[RolloutRequest, Exception]] = []
                for trajectory in engine.generate(chunk, lambda *one, failed=failed: failed.append(one), timeout=self._timeout):
                    self._events.put((server, "made", self._requests[trajectory.request_id], trajectory))
                    if self._stopped.is_set():
                        return
                for request, error in failed:
                    self._events.put((server, "made", request, error))
            except (EngineDiedError, EngineHungError):
                while not chunks.empty():  # the Dispatcher gives them to others
                    if chunks.get() is None:
                        return
                self._events.put((server, "lost", None, None))
                if not self._again(engine):
                    return
                self._events.put((server, "back", None, None))
            except Exception as error:  # of what was asked, not of the server
                self._events.put((server, "failed", None, error))
                return

    def _again(self, engine: RemoteEngine) -> bool:
        end = time.monotonic() + (self._timeout or float("inf"))
        while time.monotonic() < end and not self._stopped.is_set():
            if engine.is_back():
                return True
            time.sleep(0.5)
        return False
