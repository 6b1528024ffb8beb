"""What several ranks must agree in, and the passes that all of them make equally often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from omni_rollout.models.base.passes import PassLimit
from omni_rollout.models.base.policy import steps_to_learn
from omni_rollout.models.base.velocity import expert_at
from omni_rollout.policy.recompute import Pair, micro_batches
from omni_rollout.types import Trajectory

T = TypeVar("T")
Passes = list[tuple[list[Pair], bool]]  # micro-batches; False: it only fills up


def gathered(mine: T) -> list[T]:
    """What every rank has, rank by rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def passes_of(
    rank: int,
    shares: Sequence[Sequence[Pair]],
    trajectories: Sequence[Trajectory],
    keys: Sequence[Sequence[object]],
    limit: PassLimit,
) -> Passes:
    """A rank's micro-batches, filled up to as many as any rank has: forward and backward may gather weights from all.

    Expert by expert, so that all ranks compute with the same one at a time. False beside one that only fills up: the first
    with that expert, of its own where it has one, which weighs nothing then.

    Args:
        shares: rank -> its pairs.
        keys: of `batch_keys`.
        limit: of a micro-batch.
    """
    batches: list[dict[int, list[list[Pair]]]] = [{} for _ in shares]
    for of_rank, own in zip(batches, shares, strict=True):
        for pairs in micro_batches(trajectories, keys, own, limit):
            of_rank.setdefault(expert_of(trajectories, pairs), []).append(pairs)
    passes: Passes = []
    for expert in sorted({expert for of_rank in batches for expert in of_rank}):
        of_expert = [of_rank.get(expert, []) for of_rank in batches]
        own_batches, most = of_expert[rank], max(map(len, of_expert))
        filler = next(there[0] for there in (own_batches, *of_expert) if there)
        passes += [(pairs, True) for pairs in own_batches] + [(filler, False)] * (most - len(own_batches))
    return passes


def expert_of(trajectories: Sequence[Trajectory], pairs: Sequence[Pair]) -> int:
    """The one that all of a micro-batch takes."""
    trajectory = trajectories[pairs[0].row]
    return expert_at(trajectory.spec, steps_to_learn(trajectory)[pairs[0].index])


def check_ranks_agree(order: Sequence[str]) -> None:
    """Experts are of equal shapes: ranks that met in different ones would mix their weights and gradients without a word.

    Raises:
        RuntimeError: another rank is about to compute with other experts, or in another order. Collective.
    """
    orders = gathered(list(order))
    for rank, other in enumerate(orders):
        if other != orders[0]:
            raise RuntimeError(f"rank {rank} would compute with the experts {other}, rank 0 with {orders[0]}: not begun")
