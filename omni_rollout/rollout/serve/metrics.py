"""What Prometheus reads, under names in vLLM's style."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from omni_rollout.rollout.serve.errors import error_of
from omni_rollout.rollout.serve.host import Host
from omni_rollout.types import RolloutRequest, Trajectory

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
NAME = "omni_rollout:"


class Metrics:
    media_type = CONTENT_TYPE_LATEST

    def __init__(self, host: Host) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(NAME + name, text, registry=self._registry).set_function(value)

        gauge("num_requests_running", "Images in the engine's hands.", lambda: len(host.engine.in_flight))
        gauge("num_requests_waiting", "Images asked for that the engine does not hold yet.",
              lambda: max(host.asked - len(host.engine.in_flight), 0))  # fmt: skip
        gauge("policy_version", "Of the weights that sample.", lambda: host.engine.policy_version)
        gauge("paused", "1: what is asked for waits for /resume.", lambda: host.paused)
        labels = {"registry": self._registry}
        self._success = Counter(NAME + "request_success", "Images made.", **labels)  # type: ignore[arg-type]
        self._failure = Counter(NAME + "request_failure", "Images not made.", ["error_type"], **labels)  # type: ignore[arg-type]
        self._gone = Counter(NAME + "request_aborted", "Images whose client went away.", **labels)  # type: ignore[arg-type]
        self._latency = Histogram(
            NAME + "e2e_request_latency_seconds", "From a request to its image.", buckets=SECONDS, registry=self._registry
        )
        self._steps = Counter(NAME + "num_inference_steps", "Steps of the images made.", **labels)  # type: ignore[arg-type]

    def text(self) -> bytes:
        return generate_latest(self._registry)

    @contextmanager
    def watching(self, requests: Sequence[RolloutRequest]) -> Iterator[Callable[[int, Trajectory | Exception], None]]:
        """To be told of each result; what is not told by the end has lost its client."""
        start, left = time.perf_counter(), len(requests)

        def watch(index: int, result: Trajectory | Exception) -> None:
            nonlocal left
            left -= 1
            if isinstance(result, Exception):
                self._failure.labels(error_of(result).kind).inc()
            else:
                self._success.inc()
                self._steps.inc(requests[index].spec.num_inference_steps)
                self._latency.observe(time.perf_counter() - start)

        try:
            yield watch
        finally:
            self._gone.inc(left)
