"""One policy update from one rollout: the step that every back end shares.

trajectories, advantages ─► mini-batches ─► micro_batches ─► score ─► loss ─► backward ... step
                                 └─ the first, before its step: engine log-probs against the trainer's own
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout.config import AlgorithmConfig, TrainerConfig
from omni_rollout.diffusion.sde import gaussian_kl
from omni_rollout.models import family_module
from omni_rollout.models.base.policy import batch_keys
from omni_rollout.models.base.velocity import expert_at
from omni_rollout.policy.engines import TrainerEngine
from omni_rollout.policy.recompute import Pair, micro_batches, score
from omni_rollout.types import Trajectory


@dataclass(kw_only=True)
class Scores:
    """What was scored, pair by pair, in the order it was; all on the CPU, detached."""

    step_indices: list[int] = field(default_factory=list)
    rollout_log_probs: list[torch.Tensor] = field(default_factory=list)  # each [B] fp32
    old_log_probs: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def add(self, trajectories: Sequence[Trajectory], pairs: Sequence[Pair], old: torch.Tensor, new: torch.Tensor) -> None:
        self.step_indices += [int(trajectories[pair.row].step_indices[pair.index]) for pair in pairs]
        self.rollout_log_probs.append(torch.stack([trajectories[pair.row].log_probs[pair.index] for pair in pairs]))
        self.old_log_probs.append(old.detach().cpu())
        self.log_probs.append(new.detach().cpu())


@dataclass(kw_only=True)
class Update:
    """What one update did."""

    first: Scores  # of the first mini-batch, scored before any weight changed
    all: Scores
    losses: list[float]
    ref_kls: list[float]  # mean exact Gaussian KL to the reference policy, per micro-batch; empty without one
    grad_norms: list[float]  # before clipping, per mini-batch; not finite: that mini-batch changed nothing
    moved: dict[str, int]  # expert -> the optimizer steps that its steps of the trajectories were part of


class PolicyUpdate:
    """Binds what stays the same over a run; call it once per rollout.

    Args:
        reference: inside, gives the policy the run started from, when the loss has a KL term.
        rank, ranks: which share of the rows to score. All ranks are given all rows, so the mean is over all of them; an engine
            for several ranks sums their gradients.
    """

    def __init__(
        self,
        engine: TrainerEngine,
        algorithm: ModuleType,
        trainer: TrainerConfig,
        weights: AlgorithmConfig,
        *,
        family: str,
        dtype: torch.dtype,
        reference: Callable[[], AbstractContextManager[nn.Module]] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._engine, self._algorithm, self._trainer, self._weights = engine, algorithm, trainer, weights
        self._family, self._dtype, self._reference = family, dtype, reference
        self._rank, self._ranks = rank, ranks

    def __call__(
        self,
        trajectories: Sequence[Trajectory],
        advantages: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor],
        *,
        learning_rate: float,
        seed: int,
    ) -> Update:
        """Takes `updates_per_step` optimizer steps.

        Args:
            advantages: [B], one per trajectory.
            old_log_probs: B of [T] fp32: what the ratio is taken to.
        """
        experts: tuple[str, ...] = family_module(self._family, "spec").EXPERTS
        keys = batch_keys(trajectories)
        rows = list(range(len(trajectories)))
        random.Random(seed).shuffle(rows)
        result = Update(first=Scores(), all=Scores(), losses=[], ref_kls=[], grad_norms=[], moved=dict.fromkeys(experts, 0))
        size = -(-len(rows) // self._trainer.updates_per_step)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            share = 1.0 / sum(len(trajectories[row].step_indices) for row in chosen)
            # No advantage and no KL term: no gradient. Such rows still count in the mean.
            used = [row for row in chosen if advantages[row] != 0 or self._reference is not None]
            passes = self._passes(trajectories, keys, used)
            order = [experts[expert_of(trajectories, pairs)] for pairs, _ in passes]
            check_ranks_agree(order)
            for number, (pairs, own) in enumerate(passes):
                loss = self._loss(trajectories, pairs, advantages, old_log_probs, own, result)
                weight = len(pairs) * share if own else 0.0
                self._engine.backward(loss * weight, last=number == len(passes) - 1)
            if start == 0:
                self._keep_first(trajectories, keys, chosen, old_log_probs, used, result)
            if used:
                result.grad_norms.append(self._engine.step(learning_rate, idle=set(experts) - set(order)))
                for expert in set(order):
                    result.moved[expert] += 1
        return result

    def _passes(
        self, trajectories: Sequence[Trajectory], keys: Sequence[Sequence[object]], used: Sequence[int]
    ) -> list[tuple[list[Pair], bool]]:
        """This rank's micro-batches, filled up to as many as any rank has: forward and backward may gather weights from all.

        Expert by expert, so that all ranks compute with the same one at a time. False beside one that only fills up: the first
        with that expert, which weighs nothing then.
        """
        shares: list[dict[int, list[list[Pair]]]] = [{} for _ in range(self._ranks)]
        for rank, share in enumerate(shares):
            for pairs in micro_batches(trajectories, keys, used[rank :: self._ranks], self._trainer.micro_batch_size):
                share.setdefault(expert_of(trajectories, pairs), []).append(pairs)
        passes: list[tuple[list[Pair], bool]] = []
        for expert in sorted({expert for share in shares for expert in share}):
            of_expert = [share.get(expert, []) for share in shares]
            own, most = of_expert[self._rank], max(map(len, of_expert))
            filler = next(batches[0] for batches in of_expert if batches)
            passes += [(pairs, True) for pairs in own] + [(filler, False)] * (most - len(own))
        return passes

    def _loss(
        self,
        trajectories: Sequence[Trajectory],
        pairs: Sequence[Pair],
        advantages: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor],
        own: bool,
        result: Update,
    ) -> torch.Tensor:
        """The mean over the pairs; what was scored is kept in `result`, unless it only fills up."""
        reference = None
        if self._reference is not None:
            with torch.no_grad(), self._reference() as network:
                reference = score(network, trajectories, pairs, self._family, self._dtype)
        step = score(self._engine.module, trajectories, pairs, self._family, self._dtype)
        device = step.log_prob.device
        old = torch.stack([old_log_probs[pair.row][pair.index] for pair in pairs]).to(device)
        advantage = torch.stack([advantages[pair.row] for pair in pairs]).to(device)
        ref_kl = None if reference is None else gaussian_kl(step.mean, reference.mean, step.step_std)
        clip_range, kl_coef = self._trainer.clip_range, self._weights.kl_coef
        loss = self._algorithm.loss(step.log_prob, old, advantage, clip_range, kl=ref_kl, kl_coef=kl_coef).loss
        if own:
            result.ref_kls += [] if ref_kl is None else [float(ref_kl.detach().mean())]
            result.losses.append(float(loss.detach()))
            result.all.add(trajectories, pairs, old, step.log_prob)
        return loss

    def _keep_first(
        self,
        trajectories: Sequence[Trajectory],
        keys: Sequence[Sequence[object]],
        chosen: Sequence[int],
        old_log_probs: Sequence[torch.Tensor],
        used: Sequence[int],
        result: Update,
    ) -> None:
        """The pairs scored so far, all before the first optimizer step; when none had an advantage, one micro-batch.

        That one is scored by every rank, and counted by the first.
        """
        first = result.all
        result.first = Scores(
            step_indices=list(first.step_indices),
            rollout_log_probs=list(first.rollout_log_probs),
            old_log_probs=list(first.old_log_probs),
            log_probs=list(first.log_probs),
        )
        if used:
            return
        pairs = next(micro_batches(trajectories, keys, chosen, self._trainer.micro_batch_size))
        with torch.no_grad():
            step = score(self._engine.module, trajectories, pairs, self._family, self._dtype)
        old = torch.stack([old_log_probs[pair.row][pair.index] for pair in pairs])
        for scores in (result.first, result.all) if self._rank == 0 else ():
            scores.add(trajectories, pairs, old, step.log_prob)


def expert_of(trajectories: Sequence[Trajectory], pairs: Sequence[Pair]) -> int:
    """The one that all of a micro-batch takes."""
    trajectory = trajectories[pairs[0].row]
    return expert_at(trajectory.spec, int(trajectory.step_indices[pairs[0].index]))


def check_ranks_agree(order: Sequence[str]) -> None:
    """Experts are of equal shapes: ranks that met in different ones would mix their weights and gradients without a word.

    Raises:
        RuntimeError: another rank is about to compute with other experts, or in another order. Collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    orders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(orders, list(order))
    for rank, other in enumerate(orders):
        if other != orders[0]:
            raise RuntimeError(f"rank {rank} would compute with the experts {other}, rank 0 with {orders[0]}: not begun")
