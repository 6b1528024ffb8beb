"""Scores the images of a step that are there already, while others are still being sampled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread

from omni_rollout.rewards.base.call import threads_of_here
from omni_rollout.rewards.base.contract import RewardBatch, preferences
from omni_rollout.rewards.base.sum import WeightedSum
from omni_rollout.types import RolloutRequest, Trajectory


class Meanwhile:
    """One step's rewards, group by group, in a thread of its own, which a reward that hangs does not make the process wait for.

    A group is scored as soon as it is complete, in the order of its ids and in one call: what a reward is given together does
    not depend on which image was finished first. Use it as a context: leaving it early drops what has not begun.
    """

    def __init__(self, rewards: WeightedSum, requests: Iterable[RolloutRequest]) -> None:
        self._rewards = rewards
        self._left = Counter(request.group_id for request in requests)
        self._groups: dict[str, list[Trajectory]] = defaultdict(list)
        self._scored: list[tuple[list[Trajectory], Future[RewardBatch]]] = []
        self._asked: SimpleQueue[tuple[list[Trajectory], Future[RewardBatch]] | None] = SimpleQueue()
        Thread(target=self._score, args=[threads_of_here()], name="rewards", daemon=True).start()

    def add(self, trajectory: Trajectory) -> None:
        group = self._groups[trajectory.group_id]
        group.append(trajectory)
        self._left[trajectory.group_id] -= 1
        if not self._left[trajectory.group_id]:
            group.sort(key=lambda one: one.request_id)
            self._scored.append((group, Future()))
            self._asked.put(self._scored[-1])

    def _score(self, compute_as_here: Callable[[], None]) -> None:
        compute_as_here()
        while (asked := self._asked.get()) is not None:
            group, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._rated(group))
            except BaseException as error:  # told where the result is asked for
                future.set_exception(error)

    def _rated(self, group: Sequence[Trajectory]) -> RewardBatch:
        if group[0].prompt.targets:
            return preferences(group)
        return self._rewards([one.media for one in group], [one.prompt for one in group])

    def result(self, trajectories: Sequence[Trajectory]) -> RewardBatch:
        """Of all of them, in their order, once the last is scored."""
        places = {one.request_id: place for place, one in enumerate(trajectories)}
        total: list[float | None] = [None] * len(places)
        breakdown: dict[str, list[float | None]] = {}
        failures: list[str] = []
        for group, future in self._scored:
            batch = future.result()
            failures += batch.failures
            for row, one in enumerate(group):
                total[places[one.request_id]] = batch.total[row]
                for name, values in batch.breakdown.items():
                    breakdown.setdefault(name, [None] * len(places))[places[one.request_id]] = values[row]
        return RewardBatch(total=total, breakdown=breakdown, failures=failures)

    def __enter__(self) -> Meanwhile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for _group, future in self._scored:
            future.cancel()
        self._asked.put(None)
