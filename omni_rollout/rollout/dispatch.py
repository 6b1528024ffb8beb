"""Which server samples which request, and which next when one dies: the policy alone, without processes and without a clock.

requests ─► waiting ─► assign ─► chunks held by servers ─► finished
               ▲                        │ died
               └────────────────────────┴─► given_up

The verl back end drives it on Ray, the simulation of `docs/scaling.md` under virtual time.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable

from omni_rollout.models.base.passes import tokens_of_a_step
from omni_rollout.types import RolloutRequest

ATTEMPTS = 5  # of one request, each after the death of the server that was at it


def work(request: RolloutRequest) -> int:
    """What a request costs, in tokens passed through the transformer."""
    return request.spec.num_inference_steps * tokens_of_a_step(request.spec)


class Dispatcher:
    """Hands out the costly requests first, to the servers with the least work, and takes back what a dead server leaves.

    A server works off the chunks it was sent in their order, each in one call of its engine. It is sent the next while it
    still holds some of the last, so it does not wait for one; and at most its share of all the work left, so that at the end
    none has much more before it than another.

    The death of a server counts as an attempt for the requests of the chunk it was at. A request that was tried before
    travels with a quarter as many others each time: one that kills its servers is soon alone, and given up alone.

    Args:
        requests: with distinct ids.
        servers: their numbers; all are taken to be up.
        max_num_seqs: requests a server denoises together: the most in a chunk. A server holds fewer than twice as many.
    """

    def __init__(self, requests: Iterable[RolloutRequest], servers: Iterable[int], max_num_seqs: int) -> None:
        self._waiting = deque(sorted(requests, key=work, reverse=True))
        self._left = {request.request_id: work(request) for request in self._waiting}  # neither finished nor given up
        self._work_left = sum(self._left.values())
        self._attempts: Counter[str] = Counter()
        self._held: dict[int, _Held] = {server: _Held() for server in servers}  # by the servers that are up
        self._max_num_seqs = max_num_seqs
        self.given_up: list[RolloutRequest] = []

    @property
    def done(self) -> bool:
        return not self._left

    @property
    def left(self) -> list[str]:
        """Ids of the requests that are neither finished nor given up."""
        return list(self._left)

    def assign(self) -> list[tuple[int, list[RolloutRequest]]]:
        """Chunks to send now. To be asked again after each `finished`, `died` and `back`."""
        if not self._waiting or not self._held:
            return []
        share = self._work_left / len(self._held)
        room = [(held.work, server) for server, held in self._held.items() if held.requests < self._max_num_seqs]
        heapq.heapify(room)
        chunks: dict[int, list[RolloutRequest]] = {}
        while self._waiting and room:
            load, server = heapq.heappop(room)
            if load < share and self._fits(self._waiting[0], chunks.get(server, [])):
                request = self._waiting.popleft()
                chunks.setdefault(server, []).append(request)
                heapq.heappush(room, (load + work(request), server))
        for server, chunk in chunks.items():
            self._held[server].add(chunk)
        return list(chunks.items())

    def _fits(self, request: RolloutRequest, chunk: list[RolloutRequest]) -> bool:
        attempts = self._attempts[request.request_id]
        alike = all(self._attempts[other.request_id] == attempts for other in chunk)
        return not chunk or (alike and len(chunk) < self._max_num_seqs >> 2 * attempts)

    def finished(self, server: int, request_id: str) -> bool:
        """True the first time that a request is finished, by whichever server, also by one that was taken for dead."""
        held = server in self._held and self._held[server].remove(request_id)
        if request_id not in self._left:
            return False
        self._work_left -= self._left.pop(request_id)
        if not held:  # a late answer: the request may be waiting for another server by now
            self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        return True

    def died(self, server: int) -> list[RolloutRequest]:
        """Returns what the server leaves, which now waits for another, first in line; it is sent no more until it is `back`."""
        again = []
        held = self._held.pop(server, _Held())
        for number, chunk in enumerate(held.chunks):
            for request in chunk.values():
                if request.request_id not in self._left:
                    continue
                self._attempts[request.request_id] += number == 0
                if self._attempts[request.request_id] < ATTEMPTS:
                    again.append(request)
                else:
                    self._work_left -= self._left.pop(request.request_id)
                    self.given_up.append(request)
        self._waiting.extendleft(reversed(again))
        return again

    def back(self, server: int) -> None:
        self._held.setdefault(server, _Held())


class _Held:
    """What one server has before it, chunk by chunk; it is at the first."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, RolloutRequest]] = []
        self.requests = self.work = 0

    def add(self, chunk: list[RolloutRequest]) -> None:
        self.chunks.append({request.request_id: request for request in chunk})
        self.requests += len(chunk)
        self.work += sum(map(work, chunk))

    def remove(self, request_id: str) -> bool:
        for chunk in self.chunks:
            request = chunk.pop(request_id, None)
            if request is not None:
                self.requests -= 1
                self.work -= work(request)
                self.chunks = [chunk for chunk in self.chunks if chunk]
                return True
        return False
