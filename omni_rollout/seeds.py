"""The seeds of a run: two requests with one seed are one sample counted twice."""

from __future__ import annotations

from collections.abc import Iterable

from omni_rollout.types import RolloutRequest


class SeedLedger:
    """Remembers which request used which seed."""

    def __init__(self) -> None:
        self._used: dict[int, str] = {}
        self.collisions = 0

    def record(self, requests: Iterable[RolloutRequest]) -> list[str]:
        """Notes the seeds; returns a sentence for every one that had been used before."""
        found = []
        for request in requests:
            first = self._used.setdefault(request.seed, request.request_id)
            if first != request.request_id:
                found.append(f"seed {request.seed} of {request.request_id} was used by {first}")
        self.collisions += len(found)
        return found
