"""One policy update from one rollout: the step that every back end and every algorithm share.

trajectories, advantages ─► mini-batches ─► micro_batches ─► inputs ─► loss ─► backward ... step
                                 └─ the first, before its step: engine log-probs against the trainer's own
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from omni_rollout.algorithms import rollout_correction
from omni_rollout.algorithms.base import Algorithm, Coupled
from omni_rollout.config import TrainerConfig
from omni_rollout.data.collate import derive_seed
from omni_rollout.models import family_module
from omni_rollout.models.base.passes import PassLimit
from omni_rollout.models.base.policy import batch_keys, steps_to_learn
from omni_rollout.policy.inputs import Inputs, Rows, Shown
from omni_rollout.policy.recompute import Pair, micro_batches
from omni_rollout.policy.shares import Passes, check_ranks_agree, expert_of, gathered, passes_of
from omni_rollout.policy.trainer_engines import TrainerEngine
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

    def copy(self) -> Scores:
        return Scores(
            step_indices=list(self.step_indices),
            rollout_log_probs=list(self.rollout_log_probs),
            old_log_probs=list(self.old_log_probs),
            log_probs=list(self.log_probs),
        )


@dataclass(kw_only=True)
class Update:
    """What one update did."""

    coupled: bool  # to the rollout's log-probs; False: nothing was scored
    first: Scores = field(default_factory=Scores)  # of the first mini-batch, scored before any weight changed
    all: Scores = field(default_factory=Scores)
    losses: list[float] = field(default_factory=list)
    ref_kls: list[float] = field(default_factory=list)  # mean exact Gaussian KL to the reference, per micro-batch
    grad_norms: list[float] = field(default_factory=list)  # before clipping, per mini-batch; not finite: nothing was changed
    metrics: dict[str, list[float]] = field(default_factory=dict)  # the algorithm's own, per micro-batch
    weights: list[torch.Tensor] = field(default_factory=list)  # of rollout correction, each [T] fp32, row by row
    moved: dict[str, int]  # expert -> the optimizer steps that its steps of the trajectories were part of

    def note(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(value)


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """One optimizer step's work, as this rank sees it."""

    chosen: list[Pair]
    used: bool  # whether any rank has a gradient for it
    passes: Passes  # this rank's micro-batches
    experts: list[str]  # that they go through, one by one

    @property
    def share(self) -> float:
        """Of one pair in the mean."""
        return 1.0 / len(self.chosen)


class PolicyUpdate:
    """Binds what stays the same over a run; call it once per rollout.

    Args:
        reference: inside, gives the policy the run started from, for algorithms that need one; `old`: the old policy.
        rank, ranks: which share of the rows to score. All ranks are given all rows, so the mean is over all of them, but the
            large tensors of those that are `needed` alone; an engine for several ranks sums their gradients.
    """

    def __init__(
        self,
        engine: TrainerEngine,
        algorithm: Algorithm,
        trainer: TrainerConfig,
        *,
        family: str,
        dtype: torch.dtype,
        reference: Shown | None = None,
        old: Shown | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._engine, self._algorithm, self._trainer = engine, algorithm, trainer
        self._family, self._rank, self._ranks = family, rank, ranks
        self._skips = algorithm.needs_advantage and reference is None
        clip_range = trainer.clip_range
        self._inputs = Inputs(engine, algorithm, clip_range, family=family, dtype=dtype, reference=reference, old=old)

    def __call__(
        self,
        trajectories: Sequence[Trajectory],
        advantages: torch.Tensor,
        old_log_probs: Sequence[torch.Tensor],
        *,
        learning_rate: float,
        seed: int,
    ) -> Update:
        """Takes at most `updates_per_step` optimizer steps.

        Args:
            advantages: [B], one per trajectory.
            old_log_probs: B of [T] fp32: what the ratio is taken to.
            seed: of the step; what is drawn for it follows from this and the request.
        """
        experts: tuple[str, ...] = family_module(self._family, "spec").EXPERTS
        result = Update(coupled=isinstance(self._algorithm, Coupled), moved=dict.fromkeys(experts, 0))
        keys = batch_keys(trajectories)
        rows = Rows(trajectories=trajectories, advantages=advantages, old_log_probs=old_log_probs, seed=seed)
        rows, pairs = self._corrected(rows, self._pairs(rows), result)
        mini_batches = [self._mini_batch(rows, keys, chosen, experts) for chosen in self._cut(rows, pairs)]
        if self._algorithm.recalls:
            for pass_, _ in (one for later in mini_batches[1:] for one in later.passes):
                self._inputs.recall(rows, pass_)
        for number, mini_batch in enumerate(mini_batches):
            check_ranks_agree(mini_batch.experts)
            for place, (pass_, own) in enumerate(mini_batch.passes):
                # What is recalled is of later mini-batches: the first has it at hand.
                loss = self._loss(replace(rows, recalled={}) if number == 0 else rows, pass_, own, result)
                weight = len(pass_) * mini_batch.share if own else 0.0
                self._engine.backward(loss * weight, last=place == len(mini_batch.passes) - 1)
            if number == 0 and result.coupled:
                self._keep_first(rows, keys, mini_batch, result)
            if mini_batch.used:
                result.grad_norms.append(self._engine.step(learning_rate, idle=set(experts) - set(mini_batch.experts)))
                for expert in set(mini_batch.experts):
                    result.moved[expert] += 1
        return result

    def shares(self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, seed: int) -> list[list[int]]:
        """Rank -> rows, each row once: those that the rank learns from, and its part of those that none learns from."""
        rows = Rows(trajectories=trajectories, advantages=advantages, old_log_probs=(), seed=seed)
        shares: list[list[int]] = [[] for _ in range(self._ranks)]
        for units in self._cut(rows, self._pairs(rows)):
            used = self._used(rows, units)
            for rank, share in enumerate(shares):
                share += dict.fromkeys(pair.row for unit in used[rank :: self._ranks] for pair in unit)
        left = sorted(set(range(len(trajectories))).difference(*shares))
        return [sorted([*share, *left[rank :: self._ranks]]) for rank, share in enumerate(shares)]

    def needed(self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, seed: int, *, recomputed: bool) -> set[int]:
        """Rows whose large tensors this rank computes with: its share, and what it fills up with.

        Args:
            recomputed: whether `recompute` is called, too.
        """
        if self._ranks == 1 or (isinstance(self._algorithm, Coupled) and self._algorithm.rollout_rs):
            return set(range(len(trajectories)))  # what is rejected, and so who learns from what, shows after a recompute
        keys, shares = batch_keys(trajectories), self.shares(trajectories, advantages, seed)
        rows = Rows(trajectories=trajectories, advantages=advantages, old_log_probs=(), seed=seed)
        experts: tuple[str, ...] = family_module(self._family, "spec").EXPERTS
        mini_batches = [self._mini_batch(rows, keys, units, experts) for units in self._cut(rows, self._pairs(rows))]
        passes = [pairs for mini_batch in mini_batches for pairs, _ in mini_batch.passes]
        passes += [pairs for pairs, _ in self._scoring(trajectories, shares)] if recomputed else []
        if mini_batches and not mini_batches[0].used:
            passes += self._unused(rows, keys, mini_batches[0])
        return {*shares[self._rank], *(pair.row for pairs in passes for pair in pairs)}

    @torch.no_grad()
    def recompute(self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """The log-probs of all trajectories under the policy, each scored by one rank: [T] fp32. Collective."""
        shares = self.shares(trajectories, advantages, seed)
        own = {row: torch.empty_like(trajectories[row].log_probs) for row in shares[self._rank]}
        rows = Rows(trajectories=trajectories, advantages=advantages, old_log_probs=(), seed=seed)
        for pairs, counts in self._scoring(trajectories, shares):
            scored = self._inputs.score(rows, pairs).log_prob.cpu()
            for pair, log_prob in zip(pairs, scored, strict=True) if counts else ():
                own[pair.row][pair.index] = log_prob
        everyones = {row: log_probs for found in gathered(own) for row, log_probs in found.items()}
        return [everyones[row] for row in range(len(trajectories))]

    def _scoring(self, trajectories: Sequence[Trajectory], shares: Sequence[Sequence[int]]) -> Passes:
        """This rank's passes over the stochastic steps of its share."""
        pairs = [
            [Pair(row, index) for row in share for index in range(len(trajectories[row].step_indices))] for share in shares
        ]
        return passes_of(self._rank, pairs, trajectories, batch_keys(trajectories), PassLimit.of_trainer(self._trainer))

    def _pairs(self, rows: Rows) -> dict[int, list[Pair]]:
        """Row -> what is learned from it, as the algorithm says."""
        chosen: dict[int, list[Pair]] = {}
        for row, trajectory in enumerate(rows.trajectories):
            draw = random.Random(derive_seed(rows.seed, "steps", self._inputs.draws_by(trajectory)))
            indices = self._algorithm.steps(len(steps_to_learn(trajectory)), draw)
            chosen[row] = [Pair(row, index) for index in indices]
        return chosen

    def _corrected(self, rows: Rows, chosen: dict[int, list[Pair]], result: Update) -> tuple[Rows, dict[int, list[Pair]]]:
        """What rollout correction leaves of it; the rows with its weights."""
        algorithm = self._algorithm
        if not isinstance(algorithm, Coupled) or not (algorithm.rollout_is or algorithm.rollout_rs):
            return rows, chosen
        log_probs = [(one.log_probs, old) for one, old in zip(rows.trajectories, rows.old_log_probs, strict=True)]
        weights = [rollout_correction.weights(algorithm, *both) for both in log_probs]
        kept = [rollout_correction.kept(algorithm, *both) for both in log_probs]
        result.weights = weights if algorithm.rollout_is else []
        result.note("rollout_corr/rollout_rs_masked_fraction", 1 - sum(map(sum, kept)) / sum(map(len, kept)))
        left = {row: [pair for pair in pairs if kept[row][pair.index]] for row, pairs in chosen.items()}
        return replace(rows, weights=weights), left

    def _cut(self, rows: Rows, pairs: dict[int, list[Pair]]) -> Iterable[list[list[Pair]]]:
        """Mini-batches of units: pairs that must be scored in one micro-batch, one of each row that learns together."""
        groups = [trajectory.group_id for trajectory in rows.trajectories]
        units = self._algorithm.units(rows.advantages.tolist(), groups)
        random.Random(rows.seed).shuffle(units)
        size = max(1, -(-len(units) // self._trainer.updates_per_step))
        for start in range(0, len(units), size):
            yield [
                [pair for together in zip(*(pairs[row] for row in unit), strict=True) for pair in together]
                for unit in units[start : start + size]
            ]

    def _mini_batch(
        self, rows: Rows, keys: Sequence[Sequence[object]], units: list[list[Pair]], experts: Sequence[str]
    ) -> MiniBatch:
        chosen, used = [pair for unit in units for pair in unit], self._used(rows, units)
        passes = self._passes(rows.trajectories, keys, used)
        order = [experts[expert_of(rows.trajectories, pairs)] for pairs, _ in passes]
        return MiniBatch(chosen=chosen, used=bool(used), passes=passes, experts=order)

    def _used(self, rows: Rows, units: list[list[Pair]]) -> list[list[Pair]]:
        """Without those of no advantage and no KL term, which have no gradient. They still count in the mean."""
        return [unit for unit in units if unit and not (self._skips and rows.advantages[unit[0].row] == 0)]

    def _passes(self, trajectories: Sequence[Trajectory], keys: Sequence[Sequence[object]], units: list[list[Pair]]) -> Passes:
        """This rank's micro-batches, of whole units."""
        limit = PassLimit.of_trainer(self._trainer, self._algorithm.rows_together)
        shares = [[pair for unit in units[rank :: self._ranks] for pair in unit] for rank in range(self._ranks)]
        return passes_of(self._rank, shares, trajectories, keys, limit)

    def _loss(self, rows: Rows, pairs: Sequence[Pair], own: bool, result: Update) -> torch.Tensor:
        """The mean over the pairs; what was scored is kept in `result`, unless it only fills up."""
        given = self._inputs(rows, pairs)
        found = self._inputs.loss(given)
        if own:
            result.ref_kls += [] if given.ref_kl is None else [float(given.ref_kl.detach().mean())]
            result.losses.append(float(found.loss.detach()))
            for name, values in found.metrics.items():
                result.note(f"actor/{name}", float(values.mean()))
            if given.log_probs is not None and given.old_log_probs is not None:
                result.all.add(rows.trajectories, pairs, given.old_log_probs, given.log_probs)
        return found.loss

    def _keep_first(self, rows: Rows, keys: Sequence[Sequence[object]], mini_batch: MiniBatch, result: Update) -> None:
        """The pairs scored so far, all before the first optimizer step; when none had an advantage, one micro-batch.

        That one is scored by every rank, and counted by the first.
        """
        result.first = result.all.copy()
        if mini_batch.used or not mini_batch.chosen:
            return
        (pairs,) = self._unused(rows, keys, mini_batch)
        with torch.no_grad():
            step = self._inputs.score(rows, pairs)
        old = torch.stack([rows.old_log_probs[pair.row][pair.index] for pair in pairs])
        for scores in (result.first, result.all) if self._rank == 0 else ():
            scores.add(rows.trajectories, pairs, old, step.log_prob)

    def _unused(self, rows: Rows, keys: Sequence[Sequence[object]], mini_batch: MiniBatch) -> list[list[Pair]]:
        """What is scored of a mini-batch that nothing is learned from: one micro-batch, or none."""
        batches = micro_batches(rows.trajectories, keys, mini_batch.chosen, PassLimit.of_trainer(self._trainer))
        return list(islice(batches, 1))
