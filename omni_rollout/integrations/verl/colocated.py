"""`rollout.placement=colocated`: a trainer rank with an engine in its process, on the same GPU.

To the trainer it is a TrainerRank, to the agent loop a RolloutServer. Ray runs one of its methods at a time: ranks sample each
for itself, and meet in updates and weight syncs, of which none begins before the last trajectory is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from omni_rollout.config import TrainerEngineName
from omni_rollout.integrations.verl.rank import RankUpdate, TrainerRank, every_rank
from omni_rollout.integrations.verl.records import Weights, to_section
from omni_rollout.integrations.verl.server import RolloutServer
from omni_rollout.policy.learner import Learner, Which
from omni_rollout.policy.state import RunState
from omni_rollout.run.phases import Phase, Phases
from omni_rollout.types import RolloutRequest, Trajectory


class ColocatedRank(TrainerRank):
    """Nothing starts it again alone: when its process dies, all are started again from the newest checkpoint."""

    @every_rank
    def init_model(self, checkpoint: Path | None = None) -> None:
        self._join()
        self._server = RolloutServer(to_section(self._config))
        self._phases = Phases(self._config, self._server.engine)
        self._phases.enter(Phase.sync)
        whole = self._config.trainer.engine is TrainerEngineName.torch  # what an engine cuts cannot be shared with the rollout
        held = self._server.engine.policy_tensors() if whole else None
        self._learner = Learner(self._config, rank=self.rank, ranks=self.world_size, checkpoint=checkpoint, held=held)
        self._phases.add(self._learner)

    @every_rank
    def update_policy(
        self, keys: Sequence[str], partition: str, advantages: torch.Tensor, step: int, version: int
    ) -> RankUpdate:
        self._phases.enter(Phase.update)
        return super().update_policy(keys, partition, advantages, step, version)

    @every_rank
    def publish(self, version: int, which: Which = "sampler") -> Weights:
        """From the ranks' shards into the engine beside each, a few layers at a time: nothing is pickled or put up.

        Raises:
            WeightSyncError: a tensor is different in the engine.
        """
        self._phases.enter(Phase.sync)
        digest = self._server.engine.update_weights(self._learner.weights(which), version)
        self._phases.enter(Phase.rollout)
        return self._published(version, digest)

    @every_rank
    def save_checkpoint(self, folder: Path, run: RunState) -> str | None:
        self._phases.enter(Phase.save)
        problem = super().save_checkpoint(folder, run)
        self._phases.enter(Phase.rollout)
        return problem

    def ready(self) -> None:
        self._server.ready()

    def load(self, weights: Weights) -> str:
        """The digest of what the engine holds, which is what `publish` gave it; see `RolloutServer.load`."""
        return self._server.load(weights)

    def generate(self, requests: Sequence[RolloutRequest], weights: Weights) -> Iterator[Trajectory]:
        yield from self._server.generate(requests, weights)
