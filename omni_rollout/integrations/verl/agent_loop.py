"""Requests -> engines -> rewards -> TransferQueue, while the trainer waits.

order ─► Dispatcher ─► chunks ─► server, one after another ─► reward worker ─► TransferQueue, trajectory by trajectory
             ▲                        │ it died, or was silent for too long
             └── unfinished requests ─┘
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import transfer_queue as tq
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import AgentLoopManager as VerlAgentLoopManager
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from omni_rollout.config import Placement, RolloutConfig
from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.deaths import HungError, Pulse
from omni_rollout.integrations.verl.records import RUNTIME_ENV, Order, run_config, to_fields
from omni_rollout.integrations.verl.scores import Scores
from omni_rollout.rollout.dispatch import ATTEMPTS, Dispatcher
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import RolloutRequest, Trajectory

logger = logging.getLogger(__name__)


class RolloutFailed(RuntimeError):
    """Requests that no server could finish."""


class AgentLoopWorker:
    """An asynchronous Ray actor. verl makes it with what the trainer calls its client: here the servers' handles."""

    def __init__(self, config: Any, servers: Sequence[Any], teacher: Any, reward_workers: Sequence[Any]) -> None:
        tq.init()
        self._servers, self._config = list(servers), run_config(config[NAME])
        self._rollout, self._scores = self._config.rollout, Scores(reward_workers, self._config)
        self._journal = Journal(self._config.run_dir, keep=self._rollout.keep_finished)

    async def generate(self, order: Order) -> dict[str, Any]:
        """Returns when every trajectory lies in TransferQueue; says how many requests had to be sent again, how many had been
        finished before the run was stopped, why some could not be kept, and how many seconds it took.

        Raises:
            RolloutFailed: requests that were tried `ATTEMPTS` times, or all servers are lost; the finished ones are kept.
        """
        start = time.monotonic()
        left: dict[str, dict[int, RolloutRequest]] = {}
        for request in order.requests:
            left.setdefault(request.group_id, {})[request.member] = request
        await tq.async_kv_batch_put(keys=list(left), partition_id=order.partition, tags=[{"status": "running"} for _ in left])
        storing: list[asyncio.Task[None]] = []
        kept, todo = self._kept(order)
        for trajectory in kept:
            storing.append(asyncio.create_task(self._store(trajectory, left, order)))

        def store(trajectory: Trajectory) -> None:
            storing.append(asyncio.create_task(self._store(trajectory, left, order, keep=order.partition == "train")))

        order = replace(order, requests=tuple(todo))
        sampling = Sampling(self._servers, order, self._rollout, store)
        try:
            await sampling.run()
        finally:
            await asyncio.gather(*storing)
        seconds = time.monotonic() - start
        return {"retried": sampling.retried, "kept": len(kept), "not_kept": self._journal.failure, "seconds": seconds}

    def _kept(self, order: Order) -> tuple[Sequence[Trajectory], Sequence[RolloutRequest]]:
        if order.partition != "train":
            return [], order.requests
        model, weights = self._config.model, order.weights
        expected: dict[str, Any] = {"dtype": model.dtype.value, "parity": self._config.parity.value, "weights": weights.digest}
        if weights.machine is not None:
            expected["machine"] = weights.machine
        return self._journal.take(order.step, order.requests, expected, weights.version)

    async def _store(
        self, trajectory: Trajectory, left: dict[str, dict[int, RolloutRequest]], order: Order, *, keep: bool = False
    ) -> None:
        if keep:
            await asyncio.to_thread(self._journal.keep, order.step, trajectory)
        await tq.async_kv_batch_put(**to_sample(trajectory, await self._scores.of(trajectory), order.step, order.partition))
        group = left[trajectory.group_id]
        del group[trajectory.member]
        if not group:
            await tq.async_kv_put(key=trajectory.group_id, partition_id=order.partition, tag={"status": "finished"})


class Sampling:
    """One order under way: what the Dispatcher says goes to the servers, what becomes of it goes back to the Dispatcher."""

    def __init__(
        self,
        servers: Sequence[Any],
        order: Order,
        rollout: RolloutConfig,
        store: Callable[[Trajectory], None],
    ) -> None:
        self._servers, self._order, self._timeout, self._store = servers, order, rollout.timeout, store
        self._comes_back = rollout.placement is Placement.apart  # else a trainer rank died with it, and the run starts again
        self._dispatcher = Dispatcher(order.requests, range(len(servers)), rollout.max_num_seqs)
        self._sent: list[asyncio.Queue[tuple[int, Any]]] = [asyncio.Queue() for _ in servers]
        self._done = asyncio.Event()
        self.retried = 0

    async def run(self) -> None:
        self._send()
        done = asyncio.create_task(self._done.wait())
        serving = {asyncio.create_task(self._serve(server)) for server in range(len(self._servers))}
        try:
            while serving and not done.done():
                ended, _ = await asyncio.wait({done, *serving}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended & serving:
                    task.result()
                serving -= ended
        finally:
            for task in (done, *serving):
                task.cancel()
        if given_up := [request.request_id for request in self._dispatcher.given_up]:
            names = ", ".join(given_up)
            raise RolloutFailed(f"{len(given_up)} requests were tried {ATTEMPTS} times, the server died each time: {names}")
        if names := ", ".join(self._dispatcher.left):
            raise RolloutFailed(f"no server came back within {self._timeout:g} s; not sampled: {names}")

    def _send(self) -> None:
        for server, chunk in self._dispatcher.assign():
            stream = self._servers[server].generate.options(num_returns="streaming").remote(chunk, self._order.weights)
            self._sent[server].put_nowait((len(chunk), stream))
        if self._dispatcher.done:
            self._done.set()

    async def _serve(self, server: int) -> None:
        """Reads what one server finishes, chunk by chunk; returns when it died and does not come back in time.

        Raises:
            RayActorError, HungError: it died, or hangs, and never comes back.
        """
        while True:
            size, stream = await self._sent[server].get()
            try:
                for _ in range(size):
                    trajectory = await asyncio.wait_for(_next(stream), self._timeout)
                    if self._dispatcher.finished(server, trajectory.request_id):
                        self._store(trajectory)
                    self._send()
            except (RayActorError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    ray.kill(self._servers[server], no_restart=False)
                    if not self._comes_back:
                        silent = f"process {server} finished no image for {self._timeout:g} s (rollout.timeout): it hangs"
                        raise HungError(silent) from error
                self._sent[server] = asyncio.Queue()
                again = self._dispatcher.died(server)
                self.retried += len(again)
                logger.warning("%d requests go to another server: %s", len(again), error or "no answer")
                self._send()
                if not await self._revived(server):
                    return
                self._dispatcher.back(server)
                self._send()

    async def _revived(self, server: int) -> bool:
        """Waits until Ray has started a dead server again; False if that takes longer than the time-out."""
        end = time.monotonic() + self._timeout
        while (rest := end - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(_ready(self._servers[server]), rest)
                return True
            except RayActorError:
                if not self._comes_back:
                    raise
                await asyncio.sleep(1)
            except TimeoutError:
                break
        logger.error("server %d did not come back within %g s", server, self._timeout)
        return False


def to_sample(trajectory: Trajectory, score: dict[str, Any], step: int, partition: str) -> dict[str, Any]:
    """What TransferQueue is asked to put. What is not learned from leaves its tensors behind."""
    sample = {
        "prompt": trajectory.prompt.to_json(),
        "media": trajectory.media,
        "fingerprint": dict(trajectory.fingerprint),
        "elements": math.prod(trajectory.latents.shape[1:]),
        "breakdown": score["reward_extra_info"],
        "failures": score["failures"],
    }
    learned_from = to_fields(replace(trajectory, media=trajectory.media[:0])) if partition == "train" else {}
    tag = {
        "status": "success",
        "request_id": trajectory.request_id,
        "group_id": trajectory.group_id,
        "global_steps": step,
        "min_global_steps": trajectory.policy_version,
        "max_global_steps": trajectory.policy_version,
    }
    return {
        "keys": [f"{trajectory.group_id}_{trajectory.member}_0"],
        "fields": list_of_dict_to_tensordict([{**learned_from, "sample": sample}]),
        "tags": [tag],
        "partition_id": partition,
    }


async def _ready(server: Any) -> None:
    await server.ready.remote()


async def _next(stream: Any) -> Trajectory:
    trajectory: Trajectory = await (await stream.__anext__())
    return trajectory


class AgentLoopManager(VerlAgentLoopManager):
    """Hands orders to its worker without waiting; `wait` passes on what goes wrong there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.agent_loop_workers_class = ray.remote(runtime_env=RUNTIME_ENV)(AgentLoopWorker)
        super().__init__(*args, **kwargs)
        self._running: dict[ray.ObjectRef, Order] = {}
        self.retried = 0  # requests that were sent again, over the run
        self._pulse: Pulse | None = None
        self._told: dict[int, dict[str, Any]] = {}  # step -> what its order said of itself, of training ones

    def generate_sequences(self, prompts: Order) -> None:  # type: ignore[override]  # verl: "fully replaceable"
        """Returns at once; verl's replay buffer waits for the order's groups."""
        tags = [{"is_prompt": True, "status": "pending", "global_steps": prompts.step} for _ in prompts.groups]
        tq.kv_batch_put(keys=prompts.groups, partition_id=prompts.partition, tags=tags)
        self._running[self.agent_loop_workers[0].generate.remote(prompts)] = prompts

    def wait(self, seconds: float) -> None:
        """Returns when an order is done, or after `seconds`; raises what ended one early, and HungError where none will end."""
        if self._pulse is None:
            timeout = run_config(self.config[NAME]).rollout.timeout
            self._pulse = Pulse(self.agent_loop_workers[0], "the agent loop", timeout)
        self._pulse.check()
        if not self._running:
            time.sleep(seconds)
            return
        done, _ = ray.wait(list(self._running), timeout=seconds)
        for reference in done:
            order = self._running.pop(reference)
            told = ray.get(reference)
            self.retried += told["retried"]
            if order.partition == "train":
                self._told[order.step] = told

    def settle(self, step: int) -> dict[str, Any]:
        """What a step's order says of itself, once it has ended; its trajectories are there before that."""
        while step not in self._told:
            self.wait(1.0)
        return self._told.pop(step)

    def drain(self) -> None:
        """Returns when no order is under way: the servers are idle."""
        while self._running:
            self.wait(1.0)
