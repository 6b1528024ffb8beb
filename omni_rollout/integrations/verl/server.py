"""One RolloutEngine as a Ray actor, in a process of its own or beside a trainer rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from omni_rollout.errors import EngineDiedError
from omni_rollout.integrations.verl.records import Weights, run_config
from omni_rollout.policy.recompute import check_machine
from omni_rollout.types import RolloutRequest, Trajectory

logger = logging.getLogger(__name__)


class RolloutServer:
    """Ray starts it again when its process dies; then it holds the checkpoint's weights until it fetches the published."""

    def __init__(self, section: Any) -> None:
        from omni_rollout.rollout.engine import RolloutEngine  # the engine's libraries, in this process alone

        config = run_config(section)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.engine = RolloutEngine(
            config.model.path,
            family=config.model.family,
            dtype=config.model.dtype.value,
            max_num_seqs=config.rollout.max_num_seqs,
            parity=config.parity.value,
        )

    def ready(self) -> None:
        """Returns once the engine is up: a call waits for the constructor."""

    def load(self, weights: Weights) -> str:
        """Takes a published version, unless it has it; returns the digest of what the engine then holds.

        Raises:
            WeightSyncError: a tensor is different in the engine.
            PinnedKnobError: what this machine samples, the trainer's could not score bit for bit.
        """
        if weights.machine is not None:
            check_machine(self.engine.machine, {"machine": weights.machine})
        if (self.engine.weights_digest, self.engine.policy_version) != (weights.digest, weights.version):
            self.engine.update_weights(weights.fetch(), weights.version)
        return self.engine.weights_digest

    def generate(self, requests: Sequence[RolloutRequest], weights: Weights) -> Iterator[Trajectory]:
        """Trajectories as they finish, all of them under `weights`. Where the engine is lost, this process ends, too."""
        self.load(weights)
        try:
            yield from self.engine.generate(requests)
        except EngineDiedError:
            logger.exception("this server ends, to be started again")
            logging.shutdown()
            os._exit(1)
