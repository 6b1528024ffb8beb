"""One trainer rank: a process of verl's worker group, with the whole policy and its share of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import torch
import torch.distributed as dist
import transfer_queue as tq
from verl.plugin.platform import get_platform
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register

from omni_rollout import monitor
from omni_rollout.integrations.verl.records import Weights, column, from_fields, run_config
from omni_rollout.policy.learner import Learner, Which
from omni_rollout.policy.recompute import check_fingerprint
from omni_rollout.policy.state import RunState
from omni_rollout.policy.update import Update
from omni_rollout.trajectories.digest import buckets, combined_digest, tensor_digests

every_rank = register(dispatch_mode=cast(Any, Dispatch).ONE_TO_ALL)


@dataclass(frozen=True, kw_only=True)
class RankUpdate:
    """What a rank did in one step: `update` holds the rows of its share, norms and weights are those of all ranks."""

    update: Update
    learning_rate: float
    recomputed: bool  # the ratio was taken to the trainer's own log-probs


class TrainerRank(Worker):
    def __init__(self, section: Any) -> None:
        super().__init__()
        self._config = run_config(section)
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        self._expected: dict[str, Any] = {}

    @every_rank
    def init_model(self, checkpoint: Path | None = None) -> None:
        self._join()
        self._learner = Learner(self._config, rank=self.rank, ranks=self.world_size, checkpoint=checkpoint)

    def _join(self) -> None:
        """The other ranks, and TransferQueue."""
        if self.world_size > 1:
            device = get_platform()
            backend = "gloo" if device.device_name == "cpu" else f"cpu:gloo,{device.device_name}:nccl"
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size)
        tq.init()

    @every_rank
    def update_policy(self, keys: Sequence[str], partition: str, advantages: torch.Tensor, step: int) -> RankUpdate:
        """The update of one step, on this rank's share of the rows.

        Args:
            keys: of all trajectories in TransferQueue, in the order of their request ids.
            advantages: [B].

        Raises:
            FingerprintError: a trajectory of other weights than this rank published last.
            NotFiniteError, MismatchError: what must not reach the optimizer.
        """
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition, select_fields=["trajectory"])
        trajectories = [from_fields(values) for values in column(data, "trajectory")]
        for trajectory in trajectories:
            check_fingerprint(trajectory, self._expected)
        monitor.check_finite(step, trajectories)
        # Every rank looks at the same sample of all rows, so all decide alike.
        recompute_old = monitor.must_recompute(self._learner.engine.module, trajectories, self._config, step)
        old = self._learner.old_log_probs(trajectories, recomputed=recompute_old)
        update, rate = self._learner.step(trajectories, advantages, old, step)
        return RankUpdate(update=update, learning_rate=rate, recomputed=recompute_old)

    @every_rank
    def publish(self, version: int, which: Which = "sampler") -> Weights:
        """What the servers shall hold from now on; every rank digests its own, only the first puts them up."""
        digests: dict[str, str] = {}
        put: list[ray.ObjectRef] = []
        for bucket in buckets(self._learner.weights(which)):  # never the whole policy at once
            digests |= tensor_digests(bucket)
            if self.rank == 0:
                put.append(ray.put([(name, tensor.cpu()) for name, tensor in bucket]))
        return self._published(version, combined_digest(digests), put)

    def _published(self, version: int, digest: str, put: Sequence[ray.ObjectRef] = ()) -> Weights:
        """Said once all weights have been handed out: of a cut policy the drift is known only then."""
        self._expected = self._learner.expected(digest)
        machine, drift = self._expected.get("machine"), self._learner.drift.value
        return Weights(version=version, digest=digest, buckets=tuple(put), machine=machine, drift=drift)

    @every_rank
    def save_checkpoint(self, folder: Path, run: RunState) -> str | None:
        """Why it could not be written, on the rank that writes."""
        try:
            self._learner.save(folder, run)
        except OSError as error:
            return str(error)
        return None
