"""Simulated servers under virtual time: a step's requests, handed out by the Dispatcher that the verl back end uses.

Dispatcher.assign ─► Server: chunks ─► batch, stepped ─► agent loop, one trajectory after another ─► Dispatcher.finished
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from omni_rollout.rollout.dispatch import Dispatcher, work
from omni_rollout.types import RolloutRequest


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Seconds. A denoising step takes `step + token * tokens in the batch`, an image `image` more, once, by itself."""

    step: float
    token: float
    image: float
    max_num_seqs: int
    takes_while_running: bool = False  # a chunk joins the running batch; vllm-omni could, `RolloutEngine.generate` cannot


@dataclass(frozen=True, kw_only=True)
class Cluster:
    workers: int
    engine: Engine
    slowdown: float = 0.0  # sigma of the log-normal factor, one for each worker
    failures: float = 0.0  # per worker and hour
    hangs: float = 0.0  # share of the failures that nobody notices before the time-out
    timeout: float = 600.0
    restart: float = 120.0  # from the death to the first request, weights fetched
    store: float = 0.0  # seconds of the agent loop per trajectory


class Policy(Protocol):
    @property
    def done(self) -> bool: ...
    def assign(self) -> list[tuple[int, list[RolloutRequest]]]: ...
    def finished(self, server: int, request_id: str) -> bool: ...
    def died(self, server: int) -> list[RolloutRequest]: ...
    def back(self, server: int) -> None: ...


class UpFront:
    """What the Dispatcher replaced: all work is shared out at once, and what the dead leave again when all others are done."""

    def __init__(self, requests: Iterable[RolloutRequest], servers: Iterable[int]) -> None:
        self._todo = list(requests)
        self._held: dict[int, dict[str, RolloutRequest]] = {server: {} for server in servers}

    @property
    def done(self) -> bool:
        return not self._todo and not any(self._held.values())

    def assign(self) -> list[tuple[int, list[RolloutRequest]]]:
        if not self._held or any(self._held.values()):
            return []
        load = [(0, server) for server in self._held]
        for request in sorted(self._todo, key=work, reverse=True):
            least, server = load[0]
            self._held[server][request.request_id] = request
            heapq.heapreplace(load, (least + work(request), server))
        self._todo = []
        return [(server, list(share.values())) for server, share in self._held.items() if share]

    def finished(self, server: int, request_id: str) -> bool:
        return self._held.get(server, {}).pop(request_id, None) is not None

    def died(self, server: int) -> list[RolloutRequest]:
        again = list(self._held.pop(server, {}).values())
        self._todo += again
        return again

    def back(self, server: int) -> None:
        self._held.setdefault(server, {})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one step's requests. All but `seconds`, `ideal` and `retried` are shares of workers * seconds; they add up to 1."""

    seconds: float
    ideal: float  # seconds of workers that are all alike, never fail, and always have a full batch
    useful: float  # at what was counted
    redone: float  # at what was lost with a worker
    down: float  # between a failure and the first request after it
    idle: float
    retried: int
    finished: tuple[str, ...] = field(repr=False)


@dataclass
class Server:
    slow: float
    chunks: deque[deque[RolloutRequest]] = field(default_factory=deque)
    running: dict[str, tuple[RolloutRequest, int]] = field(default_factory=dict)  # and the steps before it
    spent: dict[str, float] = field(default_factory=dict)  # seconds, on each of the running
    life: int = 0  # counts what makes an event of before void: another batch, a death
    deaths: int = 0
    died: float = 0.0
    since: float = 0.0
    step: float = 0.0  # seconds, of the batch as it is
    down_since: float | None = None


def tokens(request: RolloutRequest) -> float:
    return work(request) / request.spec.num_inference_steps


def ideal_seconds(requests: Sequence[RolloutRequest], cluster: Cluster) -> float:
    engine = cluster.engine
    steps = sum(r.spec.num_inference_steps * (engine.step / engine.max_num_seqs + engine.token * tokens(r)) for r in requests)
    return (steps + engine.image * len(requests)) / cluster.workers


class Simulation:
    """One step's requests, from the order to the last trajectory."""

    def __init__(self, cluster: Cluster, requests: Sequence[RolloutRequest], seed: int, policy: Policy | None = None) -> None:
        self.cluster, self.requests, self._chance = cluster, requests, random.Random(seed)
        self.policy: Policy = policy or Dispatcher(requests, range(cluster.workers), cluster.engine.max_num_seqs)
        self.servers = [Server(self._chance.lognormvariate(0, cluster.slowdown)) for _ in range(cluster.workers)]
        self._now = self._agent_free = self._useful = self._redone = self._down = 0.0
        self._retried = 0
        self._finished: list[str] = []
        self.history: list[tuple[float, str]] = []  # when which kind of event was
        self._events: list[tuple[float, int, str, int, Any]] = []
        self._serial = itertools.count()

    def run(self) -> Outcome:
        for server in range(len(self.servers)):
            self._will_fail(server)
        self._send()
        while not self.policy.done:
            self._now, _, kind, server, detail = heapq.heappop(self._events)
            self.history.append((self._now, kind))
            getattr(self, f"_on_{kind}")(server, detail)
        total = self._now * len(self.servers)
        for server in self.servers:
            if server.down_since is not None:
                self._down += self._now - server.down_since
        return Outcome(
            seconds=self._now,
            ideal=ideal_seconds(self.requests, self.cluster),
            useful=self._useful / total,
            redone=self._redone / total,
            down=self._down / total,
            idle=1 - (self._useful + self._redone + self._down) / total,
            retried=self._retried,
            finished=tuple(self._finished),
        )

    def _at(self, time: float, kind: str, server: int, detail: Any = None) -> None:
        heapq.heappush(self._events, (time, next(self._serial), kind, server, detail))

    def _send(self) -> None:
        for number, chunk in self.policy.assign():
            server = self.servers[number]
            server.chunks.append(deque(chunk))
            if server.down_since is not None:
                continue  # a hanging server that nobody has noticed
            if not server.running:
                self._begin(number, max(self._now, server.since))
            elif self.cluster.engine.takes_while_running and len(server.running) < self.cluster.engine.max_num_seqs:
                steps = max(0, -int(-(self._now - server.since) // server.step))  # to the end of the step it is in
                self._advance(server, steps)
                self._begin(number, max(self._now, server.since))

    def _begin(self, number: int, start: float) -> None:
        """From `start` on, the batch is what the chunks say; the next event is its first to be through."""
        server, engine = self.servers[number], self.cluster.engine
        while server.chunks and len(server.running) < engine.max_num_seqs:
            chunk = server.chunks[0]
            if not chunk:
                if server.running and not engine.takes_while_running:
                    break
                server.chunks.popleft()
                continue
            if server.running and _size(chunk[0]) != _size(next(iter(server.running.values()))[0]):
                break  # the engine batches images of one size
            request = chunk.popleft()
            server.running[request.request_id] = (request, request.spec.num_inference_steps)
            server.spent[request.request_id] = 0.0
        server.life += 1
        server.since = start
        server.step = server.slow * (engine.step + engine.token * sum(tokens(r) for r, _ in server.running.values()))
        if server.running:
            steps = min(left for _, left in server.running.values())
            self._at(start + steps * server.step, "through", number, (server.life, steps))

    def _advance(self, server: Server, steps: int) -> None:
        share = steps * server.slow * self.cluster.engine.step / max(len(server.running), 1)
        for name, (request, left) in server.running.items():
            server.spent[name] += share + steps * server.slow * self.cluster.engine.token * tokens(request)
            server.running[name] = (request, left - steps)
        server.since += steps * server.step

    def _on_through(self, number: int, detail: tuple[int, int]) -> None:
        life, steps = detail
        server = self.servers[number]
        if life != server.life:
            return
        self._advance(server, steps)
        now = self._now
        for name in [name for name, (_, left) in server.running.items() if left == 0]:
            now += self.cluster.engine.image * server.slow
            spent = server.spent.pop(name) + self.cluster.engine.image * server.slow
            self._at(now, "leaves", number, (server.deaths, name, spent))
            del server.running[name]
        self._begin(number, now)

    def _on_leaves(self, number: int, detail: tuple[int, str, float]) -> None:
        deaths, name, spent = detail
        server = self.servers[number]
        if deaths != server.deaths:  # it died before it was through with this image
            self._redone += spent - min(self.cluster.engine.image * server.slow, self._now - server.died)
            return
        self._agent_free = max(self._now, self._agent_free) + self.cluster.store
        self._at(self._agent_free, "stored", number, (name, spent))

    def _on_stored(self, number: int, detail: tuple[str, float]) -> None:
        name, spent = detail
        if self.policy.finished(number, name):
            self._useful += spent
            self._finished.append(name)
        else:
            self._redone += spent
        self._send()

    def _will_fail(self, number: int) -> None:
        if self.cluster.failures:
            self._at(self._now + self._chance.expovariate(self.cluster.failures / 3600), "fails", number)

    def _on_fails(self, number: int, _: Any) -> None:
        server = self.servers[number]
        server.life += 1
        server.deaths += 1
        if server.running:
            self._redone += sum(server.spent.values()) + max(0.0, self._now - server.since)
        server.running, server.spent = {}, {}
        server.down_since = server.died = self._now
        delay = self.cluster.timeout if self._chance.random() < self.cluster.hangs else 0.0
        self._at(self._now + delay, "noticed", number)

    def _on_noticed(self, number: int, _: Any) -> None:
        self.servers[number].chunks.clear()
        self._retried += len(self.policy.died(number))
        self._at(self._now + self.cluster.restart, "back", number)
        self._send()

    def _on_back(self, number: int, _: Any) -> None:
        server = self.servers[number]
        self._down += self._now - (server.down_since or 0.0)
        server.down_since = None
        self.policy.back(number)
        self._will_fail(number)
        self._send()


def _size(request: RolloutRequest) -> tuple[int, int]:
    return request.spec.height, request.spec.width
