"""One trainer rank: a process of verl's worker group, with the whole policy and its share of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
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
from omni_rollout.config import OldLogProbs
from omni_rollout.integrations.verl.records import Weights, column, from_fields, run_config, size_of
from omni_rollout.policy.learner import Learner, Which
from omni_rollout.policy.recompute import check_fingerprint
from omni_rollout.policy.state import RunState
from omni_rollout.policy.update import Update
from omni_rollout.trajectories.digest import buckets, combined_digest, tensor_digests

every_rank = register(dispatch_mode=cast(Any, Dispatch).ONE_TO_ALL, blocking=False)  # who waits says how long


@dataclass(frozen=True, kw_only=True)
class RankUpdate:
    """What a rank did in one step: `update` holds the rows of its share, norms and weights are those of all ranks."""

    update: Update
    learning_rate: float
    inspection: monitor.Inspection  # the same on all ranks
    fetched: int  # bytes of the trajectories that this rank was sent


class TrainerRank(Worker):
    def __init__(self, section: Any) -> None:
        super().__init__()
        self._config = run_config(section)
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        self._expected: dict[int, dict[str, Any]] = {}  # version -> what a trajectory's fingerprint must say; the latest two

    @every_rank
    def init_model(self, checkpoint: Path | None = None) -> None:
        self._join()
        self._learner = Learner(self._config, rank=self.rank, ranks=self.world_size, checkpoint=checkpoint)

    def _join(self) -> None:
        """The other ranks, and TransferQueue."""
        if self.world_size > 1:
            device = get_platform()
            backend = "gloo" if device.device_name == "cpu" else f"cpu:gloo,{device.device_name}:nccl"
            patience = timedelta(seconds=2 * self._config.launch.timeout)  # longer than the driver's, which says who hangs
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=patience)
        tq.init()

    @every_rank
    def update_policy(
        self, keys: Sequence[str], partition: str, advantages: torch.Tensor, step: int, version: int
    ) -> RankUpdate:
        """The update of one step, on this rank's share of the rows.

        Args:
            keys: of all trajectories in TransferQueue, in the order of their request ids.
            advantages: [B].
            version: of the policy that sampled them.

        Raises:
            FingerprintError: a trajectory of other weights than this rank published as that version.
            NotFiniteError, MismatchError: what must not reach the optimizer.
        """
        learner, config = self._learner, self._config
        told = self._column(keys, partition, "trajectory")
        trajectories = [from_fields(values) for values in told]
        for trajectory in trajectories:
            check_fingerprint(trajectory, self._expected[version])
        # Every rank looks at the same sample of all rows, so all decide alike.
        compared = monitor.inspected_rows(trajectories, config, step)
        recomputed = config.trainer.old_log_probs is OldLogProbs.recompute or bool(compared)  # by config, or it may turn out so
        rows = sorted(compared | learner.needed(trajectories, advantages, step, recomputed=recomputed))
        tensors = self._column([keys[row] for row in rows], partition, "tensors")
        for row, large in zip(rows, tensors, strict=True):
            trajectories[row] = from_fields(told[row], large)
        monitor.check_finite(step, trajectories)
        inspection = monitor.inspect(learner, trajectories, config, step)
        old = learner.old_log_probs(trajectories, advantages, step, recomputed=inspection.recompute)
        update, rate = learner.step(trajectories, advantages, old, step)
        fetched = sum(map(size_of, [*told, *tensors]))
        return RankUpdate(update=update, learning_rate=rate, inspection=inspection, fetched=fetched)

    def _column(self, keys: Sequence[str], partition: str, name: str) -> list[Any]:
        if not keys:
            return []
        return column(tq.kv_batch_get(keys=list(keys), partition_id=partition, select_fields=[name]), name)

    @every_rank
    def publish(self, version: int, which: Which = "sampler") -> Weights:
        """What the servers shall hold from now on; every rank digests its own, only the first puts them up."""
        digests: dict[str, str] = {}
        put: list[ray.ObjectRef] = []
        adapter, size = self._learner.adapter(which), 0
        for bucket in buckets(self._learner.weights(which)):  # never the whole policy at once
            digests |= tensor_digests(bucket)
            if self.rank == 0 and adapter is None:
                put.append(ray.put([(name, tensor.cpu()) for name, tensor in bucket]))
                size += sum(tensor.nbytes for _, tensor in bucket)
        if self.rank == 0 and adapter is not None:
            put.append(ray.put(list(adapter.factors.items())))
            size = sum(tensor.nbytes for tensor in adapter.factors.values())
        scale = None if adapter is None else adapter.scale
        return replace(self._published(version, combined_digest(digests)), buckets=tuple(put), bytes=size, lora_scale=scale)

    def _published(self, version: int, digest: str) -> Weights:
        """Said once all weights have been handed out: of a cut policy the drift is known only then."""
        expected = self._learner.expected(digest)
        latest = sorted({*self._expected, version})[-2:]
        self._expected = {one: found for one, found in {**self._expected, version: expected}.items() if one in latest}
        return Weights(version=version, digest=digest, machine=expected.get("machine"), drift=self._learner.drift.value)

    @every_rank
    def save_checkpoint(self, folder: Path, run: RunState) -> str | None:
        """Why it could not be written, on the rank that writes."""
        try:
            self._learner.save(folder, run)
        except OSError as error:
            return str(error)
        return None
