"""The seeds of a run: two requests with one seed, or with one starting noise, are one sample counted twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from omni_rollout.types import RolloutRequest, Trajectory


class SeedLedger:
    """Remembers which request used which seed, and which image started from which noise.

    Args:
        path: where both are kept, one JSON object a line; what is there already is remembered. None: in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._used: dict[object, str] = {}
        self.collisions = self.lines = 0
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                name = entry.pop("request_id")
                self._remember([(kind, value, name) for kind, value in entry.items()])

    def record(self, requests: Iterable[RolloutRequest]) -> list[str]:
        """Notes the seeds, before sampling; returns a sentence for every one that had been used before."""
        return self._note([("seed", request.seed, request.request_id) for request in requests])

    def record_noise(self, trajectories: Iterable[Trajectory]) -> list[str]:
        """Notes the digest of the noise that each image really started from; sentences as above."""
        sampled = [t for t in trajectories if "initial_noise" in t.fingerprint]  # others are images of a data set
        return self._note([("initial_noise", t.fingerprint["initial_noise"], t.request_id) for t in sampled])

    def _note(self, entries: list[tuple[str, object, str]]) -> list[str]:
        if self._path is not None:
            with self._path.open("a") as ledger:
                ledger.writelines(json.dumps({"request_id": name, kind: value}) + "\n" for kind, value, name in entries)
        return self._remember(entries)

    def _remember(self, entries: list[tuple[str, object, str]]) -> list[str]:
        found = []
        for kind, value, request_id in entries:
            first = self._used.setdefault((kind, value), request_id)
            if first != request_id:
                found.append(f"{kind} {value} of {request_id} was used by {first}")
        self.collisions += len(found)
        self.lines += len(entries)
        return found
