"""The engine's own thread. Requests of all clients share its batches; weights come in between.

http's loop ─► Work ─► call_soon_threadsafe ─► RolloutEngine.submit ─► results, as they finish ─► http's loop
                                                       ▲
             pause ─► drain ─► update_weights ─► resume ┘   (what is asked for meanwhile waits)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import torch

from omni_rollout.diffusion.machine import pin_thread
from omni_rollout.errors import EngineDiedError, WeightSyncError
from omni_rollout.rollout.engine import LIVENESS_SECONDS, RolloutEngine
from omni_rollout.rollout.records import together
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.types import RolloutRequest, Trajectory

T = TypeVar("T")
Result = Trajectory | Exception


class Work:
    """The requests of one body, until each has its result or their client has gone; a context manager, of http's loop.

    Args:
        weights: digest of the policy that they are meant for; None: whichever the engine holds.
    """

    def __init__(self, host: Host, requests: Sequence[RolloutRequest], weights: str | None) -> None:
        self.requests, self.weights = requests, weights
        self.tasks: dict[int, asyncio.Task[Any]] = {}  # of the engine's thread, like the next two
        self.gone = False
        self._told: set[int] = set()
        self._host, self._loop = host, asyncio.get_running_loop()
        self._results: asyncio.Queue[tuple[int, Result]] = asyncio.Queue()
        self._left = len(requests)

    def __enter__(self) -> Work:
        self._host.asked += self._left
        self._host.engine.loop.call_soon_threadsafe(self._host._enter, self)
        return self

    async def results(self) -> list[tuple[int, Result]]:
        """Those that have finished, at least one: its position, and the trajectory or what kept it from being made."""
        results = [await self._results.get()]
        while not self._results.empty():
            results.append(self._results.get_nowait())
        self._left -= len(results)
        self._host.asked -= len(results)
        return results

    def __exit__(self, *_: object) -> None:
        """Frees the places of what is not finished."""
        self._host.asked -= self._left
        self._left = 0
        self._host.engine.loop.call_soon_threadsafe(self._host._leave, self)

    def tell(self, index: int, result: Result) -> None:
        if not self.gone and index not in self._told:
            self._told.add(index)
            self._loop.call_soon_threadsafe(self._results.put_nowait, (index, result))

    def fail(self, error: Exception) -> None:
        for index in range(len(self.requests)):
            self.tell(index, error)


class Host:
    """Starts the engine and serves it until `close`. All methods are for http's loop; what has `_` runs in the engine's thread.

    Args:
        make: makes the engine, in the thread that will own it.
        timeout: seconds without a finished image, while some are in flight, after which the engine is taken for dead.
        died: called once, from that thread, when it is.
    """

    def __init__(self, make: Callable[[], RolloutEngine], timeout: float, died: Callable[[], None]) -> None:
        self._make, self._timeout, self._died = make, timeout, died
        self.threads = torch.get_num_threads()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._held = False
        self._waiting: deque[Work] = deque()
        self._admitted: set[Work] = set()
        self.asked = self.finished = 0  # images, now and ever
        self.paused = self.broken = False
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        pin_thread(self.threads)
        try:
            self.engine = self._make()
            self._weights_lock = asyncio.Lock()
            self.layout: dict[str, tuple[str, list[int]]] = self.engine.policy_layout()
        except BaseException as error:
            self._failure = error
            self._started.set()
            return
        loop = self.engine.loop
        asyncio.set_event_loop(loop)
        watch = loop.create_task(self._watch())
        self._started.set()
        loop.run_forever()
        watch.cancel()
        if self.engine.alive and self._failure is None:
            for task in self.engine.in_flight:
                task.cancel()
            self.engine.close()

    def work(self, requests: Sequence[RolloutRequest], weights: str | None) -> Work:
        return Work(self, requests, weights)

    def _enter(self, work: Work) -> None:
        if self._failure is not None:
            work.fail(EngineDiedError(str(self._failure)))
        elif self._held:
            self._waiting.append(work)
        else:
            self._admit(work)

    def _admit(self, work: Work) -> None:
        if work.gone:
            return
        if work.weights not in (None, self.engine.weights_digest):
            held = self.engine.weights_digest
            text = f"weights: meant for {str(work.weights)[:16]}, the engine holds {held[:16]}"
            work.fail(BadRequest(text, "weights", 409, "weights_error"))
            return
        self._admitted.add(work)
        places = {id(request): index for index, request in enumerate(work.requests)}
        for request in together(work.requests):
            index = places[id(request)]

            def deliver(result: Result, index: int = index) -> None:
                self.finished += 1
                self._last = time.monotonic()
                work.tell(index, result)

            work.tasks[index] = self.engine.submit(request, deliver)

    def _leave(self, work: Work) -> None:
        work.gone = True
        self._admitted.discard(work)
        if work in self._waiting:
            self._waiting.remove(work)
        for task in work.tasks.values():
            task.cancel()  # of one that is done: nothing

    async def pause(self, mode: str) -> None:
        """What is asked for from now on waits. Returns when nothing is in flight: `wait` for its end, or `abort` it."""
        await self._there(self._pause(mode))

    async def resume(self) -> None:
        await self._there(self._resume())

    async def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """As `RolloutEngine.update_weights`, between the trajectories of one policy and those of the next."""
        return await self._there(self._update(named, version))

    async def _there(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.engine.loop))

    async def _pause(self, mode: str) -> None:
        self._held = self.paused = True
        if mode == "abort":
            for work in [*self._admitted, *self._waiting]:
                work.fail(BadRequest("ended by a pause (mode=abort); ask again", status=409, kind="aborted_error"))
                self._leave(work)
        await self._drained()

    async def _drained(self) -> None:
        while self.engine.busy:
            await asyncio.wait(self.engine.busy)

    async def _resume(self) -> None:
        self._held = self.paused = False
        while self._waiting and not self._held:
            self._admit(self._waiting.popleft())

    async def _update(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        async with self._weights_lock:
            self._held = True
            await self._drained()
            try:
                return self.engine.update_weights(named, version)
            except WeightSyncError:
                self.broken = True
                raise
            finally:
                if not self.paused:
                    await self._resume()

    async def _watch(self) -> None:
        self._last = time.monotonic()
        while self._failure is None:
            await asyncio.sleep(min(LIVENESS_SECONDS, self._timeout / 2))
            now = time.monotonic()
            if not self.engine.busy:
                self._last = now
            if not self.engine.alive:
                self._failure = EngineDiedError("the engine's thread has ended, see its error above; the server ends")
            elif now - self._last > self._timeout:
                self._failure = EngineDiedError(f"no image for {self._timeout:g} s (serve.timeout): the engine hangs")
        for work in [*self._admitted, *self._waiting]:
            work.fail(EngineDiedError(str(self._failure)))
        self._died()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def close(self) -> None:
        """Ends what is in flight, and the engine."""
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)
        self._thread.join()
