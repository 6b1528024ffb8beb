"""Requests -> engines -> rewards -> TransferQueue, while the trainer waits.

order ─► assign (by work) ─► one stream for each server ─► reward worker ─► TransferQueue, trajectory by trajectory
             ▲                        │ it died, or was silent for too long
             └── unfinished requests ─┘
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import ray
import transfer_queue as tq
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import AgentLoopManager as VerlAgentLoopManager
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.records import NO_TRAINER, Order, run_config, to_fields
from omni_rollout.integrations.verl.reward import to_score
from omni_rollout.types import RolloutRequest, Trajectory

ATTEMPTS = 5  # of one request, each after the death of the server that had it
logger = logging.getLogger(__name__)
Server = TypeVar("Server")


class RolloutFailed(RuntimeError):
    """Requests that no server could finish."""


def work(request: RolloutRequest) -> int:
    """What a request costs, in tokens passed through the transformer."""
    spec = request.spec
    tokens = (spec.height // 16) * (spec.width // 16) + spec.prompt_width
    guidance = (spec.height // 16) * (spec.width // 16) + spec.negative_prompt_width if spec.guided else 0
    return spec.num_inference_steps * (tokens + guidance)


def assign(requests: Sequence[RolloutRequest], servers: Sequence[Server]) -> list[tuple[Server, list[RolloutRequest]]]:
    """Each request to the server with the least work so far, the costly ones first; servers left without any are left out."""
    load = [0] * len(servers)
    shares: list[list[RolloutRequest]] = [[] for _ in servers]
    for request in sorted(requests, key=work, reverse=True):
        least = load.index(min(load))
        load[least] += work(request)
        shares[least].append(request)
    return [(server, share) for server, share in zip(servers, shares, strict=True) if share]


class AgentLoopWorker:
    """An asynchronous Ray actor. verl makes it with what the trainer calls its client: here the servers' handles."""

    def __init__(self, config: Any, servers: Sequence[Any], teacher: Any, reward_workers: Sequence[Any]) -> None:
        tq.init()
        self._servers, self._reward_workers = list(servers), list(reward_workers)
        self._timeout = run_config(config[NAME]).rollout.timeout
        self._next_reward = 0

    async def generate(self, order: Order) -> dict[str, int]:
        """Returns when every trajectory lies in TransferQueue; says how many requests had to be sent again.

        Raises:
            RolloutFailed: requests that were tried `ATTEMPTS` times; the finished ones are kept.
        """
        left: dict[str, dict[int, RolloutRequest]] = {}
        for request in order.requests:
            left.setdefault(request.group_id, {})[request.member] = request
        await tq.async_kv_batch_put(keys=list(left), partition_id=order.partition, tags=[{"status": "running"} for _ in left])
        todo, servers, retried = list(order.requests), self._servers, 0
        for _ in range(ATTEMPTS):
            shares = assign(todo, servers)
            unfinished = await asyncio.gather(*[self._drain(server, share, left, order) for server, share in shares])
            todo = [request for requests in unfinished for request in requests]
            if not todo:
                return {"retried": retried}
            retried += len(todo)
            dead = [server for (server, _), requests in zip(shares, unfinished, strict=True) if requests]
            servers = [server for server in self._servers if server not in dead]
            if not servers:
                await asyncio.gather(*[self._revived(server) for server in dead])
                servers = self._servers
        names = ", ".join(request.request_id for request in todo)
        raise RolloutFailed(f"{len(todo)} requests were tried {ATTEMPTS} times, the last server died each time: {names}")

    async def _drain(
        self, server: Any, requests: list[RolloutRequest], left: dict[str, dict[int, RolloutRequest]], order: Order
    ) -> list[RolloutRequest]:
        """Has one server sample `requests`; returns those it did not finish before it died."""
        unfinished = {request.request_id: request for request in requests}
        storing: list[asyncio.Task[None]] = []
        try:
            stream = server.generate.options(num_returns="streaming").remote(requests, order.weights)
            while unfinished:
                trajectory = await asyncio.wait_for(_next(stream), self._timeout)
                del unfinished[trajectory.request_id]
                storing.append(asyncio.create_task(self._store(trajectory, left, order)))
        except (RayActorError, TimeoutError) as error:
            logger.warning("%d requests go to another server: %s", len(unfinished), error or "no answer")
            if isinstance(error, TimeoutError):
                ray.kill(server, no_restart=False)
        await asyncio.gather(*storing)
        return list(unfinished.values())

    async def _store(self, trajectory: Trajectory, left: dict[str, dict[int, RolloutRequest]], order: Order) -> None:
        score = await self._score(trajectory)
        sample = {
            "prompt": {"text": trajectory.prompt.text, "metadata": dict(trajectory.prompt.metadata)},
            "image": trajectory.image,
            "fingerprint": dict(trajectory.fingerprint),
            "elements": math.prod(trajectory.latents.shape[1:]),
            "reward": score["reward_score"],
            "breakdown": score["reward_extra_info"],
        }
        learned_from = {"trajectory": to_fields(trajectory)} if order.partition == "train" else {}
        version = trajectory.policy_version
        await tq.async_kv_batch_put(
            keys=[f"{trajectory.group_id}_{trajectory.member}_0"],
            fields=list_of_dict_to_tensordict([{**learned_from, "sample": sample}]),
            tags=[
                {
                    "status": "success",
                    "request_id": trajectory.request_id,
                    "group_id": trajectory.group_id,
                    "global_steps": order.step,
                    "min_global_steps": version,
                    "max_global_steps": version,
                }
            ],
            partition_id=order.partition,
        )
        group = left[trajectory.group_id]
        del group[trajectory.member]
        if not group:
            await tq.async_kv_put(key=trajectory.group_id, partition_id=order.partition, tag={"status": "finished"})

    async def _score(self, trajectory: Trajectory) -> dict[str, Any]:
        end = time.monotonic() + self._timeout
        while True:
            worker = self._reward_workers[self._next_reward % len(self._reward_workers)]
            self._next_reward += 1
            try:
                result: dict[str, Any] = await worker.compute_score.remote(to_score(trajectory))
                return result
            except RayActorError:  # Ray starts it again; meanwhile another may have time
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(1)

    async def _revived(self, server: Any) -> None:
        """Waits until Ray has started a dead server again."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                await server.ready.remote()
                return
            except RayActorError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(1)


async def _next(stream: Any) -> Trajectory:
    trajectory: Trajectory = await (await stream.__anext__())
    return trajectory


class AgentLoopManager(VerlAgentLoopManager):
    """Hands orders to its worker without waiting; `wait` passes on what goes wrong there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(runtime_env=NO_TRAINER)(AgentLoopWorker)
        super().__init__(*args, **kwargs)
        self._running: list[ray.ObjectRef] = []
        self.retried = 0  # requests that were sent again, over the run

    def generate_sequences(self, prompts: Order) -> None:  # type: ignore[override]  # verl: "fully replaceable"
        self._running.append(self.agent_loop_workers[0].generate.remote(prompts))

    def wait(self, seconds: float) -> None:
        """Returns when an order is done, or after `seconds`; raises what ended one early."""
        if not self._running:
            time.sleep(seconds)
            return
        done, self._running = ray.wait(self._running, timeout=seconds)
        for reference in done:
            self.retried += ray.get(reference)["retried"]
