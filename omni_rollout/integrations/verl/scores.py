"""The reward workers as the agent loop asks them: one that dies or hangs is started again by Ray, and asked again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from omni_rollout.config import TrainConfig
from omni_rollout.integrations.verl.deaths import HungError, place, status_of
from omni_rollout.integrations.verl.reward import to_score
from omni_rollout.types import Trajectory

logger = logging.getLogger(__name__)


class Scores:
    """One worker after another, each of which scores an image at a time.

    A worker ends a reward that takes longer than `reward.timeout` by itself. So one that gave no score for as long as all of
    its rewards may take, and `rollout.timeout` more, hangs, and is killed.
    """

    def __init__(self, workers: Sequence[Any], config: TrainConfig) -> None:
        self._workers, self._turns = list(workers), itertools.cycle(range(len(workers)))
        self._patience = config.rollout.timeout  # seconds until one that died is there again
        self._limit = self._patience + len(config.reward.weights) * config.reward.timeout
        self._heard = [time.monotonic()] * len(self._workers)  # when each gave a score, or was killed
        self._hung: set[int] = set()  # those that gave no score since they were killed
        self._places: dict[int, Any] = {}  # references of node and process, of those that are there

    async def of(self, trajectory: Trajectory) -> dict[str, Any]:
        """What `RewardManager.run_single` returns.

        Raises:
            RayActorError: no worker came back.
            HungError: one hangs that was started again because it had hung.
        """
        data, start = to_score(trajectory), time.monotonic()
        while True:
            number = next(self._turns)
            try:
                return await self._answer(number, data)
            except RayActorError:  # Ray starts it again; meanwhile another may have time
                self._places.pop(number, None)
                if time.monotonic() - max(start, self._heard[number]) > self._patience:
                    raise
                await asyncio.sleep(1)

    async def _answer(self, number: int, data: Any) -> dict[str, Any]:
        worker, asked = self._workers[number], time.monotonic()
        if number not in self._places:
            self._places[number] = place(worker)
        answer = asyncio.wrap_future(worker.compute_score.remote(data).future())
        while not answer.done():
            silent = time.monotonic() - max(asked, self._heard[number])
            if silent < self._limit:
                await asyncio.wait({answer}, timeout=self._limit - silent)
            else:
                await self._give_up(number)  # then the answer is that it died
        score: dict[str, Any] = answer.result()
        self._heard[number] = time.monotonic()
        self._hung.discard(number)
        return score

    async def _give_up(self, number: int) -> None:
        self._heard[number] = time.monotonic()  # at once: others wait for it too
        again = number in self._hung
        self._hung.add(number)
        named = await self._named(number)
        why = f"{named} gave no score for {self._limit:g} s (rollout.timeout, and reward.timeout of each reward)"
        ray.kill(self._workers[number], no_restart=False)
        if again:
            raise HungError(f"{why}, as before it was started again")
        logger.warning("%s; it is started again, and asked again", why)

    async def _named(self, number: int) -> str:
        """With its process, if that has ever answered."""
        name = f"reward worker {number}"
        try:
            node, pid = await asyncio.wait_for(_of(self._places[number]), 1.0)
        except (KeyError, RayActorError, TimeoutError):
            return name
        return f"{name} (process {pid}) is {await asyncio.to_thread(status_of, node, pid)}: it"


async def _of(reference: Any) -> Any:
    return await reference
