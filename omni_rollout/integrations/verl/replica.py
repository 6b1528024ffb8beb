"""verl's replicas, of which each is one RolloutServer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from verl.plugin.platform import get_platform
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, RolloutReplicaRegistry

from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.records import RUNTIME_ENV, Weights
from omni_rollout.integrations.verl.server import RolloutServer

logger = logging.getLogger(__name__)


class Replica(RolloutReplica):
    """verl gives it our section of the configuration as its `model_config`."""

    async def init_standalone(self) -> None:
        self.rollout_mode = RolloutMode.STANDALONE
        await self.launch_servers()

    async def launch_servers(self) -> None:
        accelerated = get_platform().device_name != "cpu"
        server: Any = (
            ray.remote(RolloutServer)
            .options(
                name=f"{NAME}_server_{self.replica_rank}",
                max_restarts=-1,
                num_cpus=1,
                num_gpus=1 if accelerated else 0,
                runtime_env=RUNTIME_ENV,
            )
            .remote(self.model_config)
        )
        await server.ready.remote()
        self.servers, self._server_handle, self._server_address = [server], server, f"{NAME}_server_{self.replica_rank}"


def launch(rollout: Any, section: Any, workers: int) -> list[Any]:
    """Starts `workers` servers at once, and returns their handles when all are up."""
    kind = RolloutReplicaRegistry.get(NAME)
    replicas = [kind(replica_rank=rank, config=rollout, model_config=section, gpus_per_node=1) for rank in range(workers)]

    async def start() -> None:
        await asyncio.gather(*[replica.init_standalone() for replica in replicas])

    asyncio.run(start())
    return [replica.server_handle for replica in replicas]


def push(servers: Sequence[Any], weights: Weights, timeout: float) -> int:
    """Gives a version to every server and returns how many hold it now; a dead one fetches it when it is back.

    One that is silent for `timeout` seconds is killed, for Ray to start it again.

    Raises:
        RuntimeError: a server holds other bits than were published.
    """
    loading = {server.load.remote(weights): index for index, server in enumerate(servers)}
    answered, silent = ray.wait(list(loading), num_returns=len(loading), timeout=timeout)
    for reference in silent:
        logger.warning("server %d took no weights in %g s: it is killed, and started again", loading[reference], timeout)
        ray.kill(servers[loading[reference]], no_restart=False)
    held = 0
    for reference in answered:
        index = loading[reference]
        try:
            digest = ray.get(reference)
        except RayActorError:
            continue
        if digest != weights.digest:
            raise RuntimeError(f"server {index} holds weights {digest[:16]}: expected {weights.digest[:16]}")
        held += 1
    return held


RolloutReplicaRegistry.register(NAME, lambda: Replica)
