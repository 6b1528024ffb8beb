"""Policy, optimizer and average of one run: what every back end trains with, whatever brings it the trajectories."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import Parity, TrainConfig, TrainerEngineName
from omni_rollout.data.collate import derive_seed
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import compute_device
from omni_rollout.diffusion.self_check import checker
from omni_rollout.models import family_module
from omni_rollout.models.base.network import Held
from omni_rollout.policy.checkpoint import load_generators, load_policy, save_policy, to_masters
from omni_rollout.policy.drift import Drift
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.inputs import Shown
from omni_rollout.policy.lora import as_saved, attach_lora, base_alone, without_adapted
from omni_rollout.policy.rng import seed_generators
from omni_rollout.policy.state import RunState
from omni_rollout.policy.tensor_files import Pending, collected
from omni_rollout.policy.trainer_engines import learning_rate_at, make_trainer_engine
from omni_rollout.policy.trainer_engines.torch_engine import TorchEngine
from omni_rollout.policy.update import PolicyUpdate, Update
from omni_rollout.rollout.adapter import Adapter
from omni_rollout.types import Trajectory

# What an engine can be given: the policy that rollouts are sampled with, the one that is trained, its average, and with
# rollout.ahead=1 the one before the latest update.
Which = Literal["sampler", "policy", "average", "behaviour"]


class Learner:
    """Loads the policy that `config` names, and learns by the algorithm that it names.

    Args:
        rank, ranks: of torch's process group, which must exist when there is more than one. Every rank loads the whole
            policy and is told of all rows; it has the large tensors of those that it needs, scores its share, and the
            gradients are summed. What it keeps of the policy is the trainer engine's matter.
        checkpoint: to go on from; the reference of a KL term stays the policy that `config` names.
        held: what the engine of this process holds: the weights that a LoRA does not touch are shared with it.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        rank: int = 0,
        ranks: int = 1,
        checkpoint: Path | None = None,
        held: Held | None = None,
    ) -> None:
        self.config = config
        self.algorithm = get_algorithm(config.algorithm)
        trainer = config.trainer
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        seed_generators(config.sampling.seed)
        family = family_module(config.model.family, "policy")
        self.shared = self._shareable(held or {}, family.LORA_TARGETS)
        self.policy = family.load_policy(config.model.path, self.dtype, config.parity.value, self.shared)
        if not trainer.lora_rank or trainer.engine is TrainerEngineName.deepspeed:  # which takes a policy of one dtype only
            to_masters(self.policy)
        self._device = compute_device()
        if trainer.engine is not TrainerEngineName.fsdp2:
            self.policy.to(self._device)
        self.drift = Drift(effective_weights(self.policy, self.dtype))
        copied = self.algorithm.needs_reference and not trainer.lora_rank
        start = copy.deepcopy(self.policy).requires_grad_(False) if copied else None
        self._start = start
        if trainer.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        if trainer.lora_rank:
            seed = config.sampling.seed
            parameters = attach_lora(self.policy, rank=trainer.lora_rank, alpha=trainer.lora_alpha, seed=seed)
        else:
            parameters = list(self.policy.parameters())
        saved = load_policy(checkpoint, self.policy) if checkpoint is not None else None
        self._machine = checker(self.policy, self.dtype, self._device)
        self.engine = make_trainer_engine(trainer, self.policy, parameters)
        del parameters  # whole, where the engine has cut them: nobody may hold them any longer
        self.old = ExponentialAverage(self.engine, None) if self.algorithm.keeps_old else None
        self.update = PolicyUpdate(
            self.engine,
            self.algorithm,
            trainer,
            family=config.model.family,
            dtype=self.dtype,
            reference=self._reference(start) if self.algorithm.needs_reference else None,
            old=self._old_policy if self.old is not None else None,
            rank=rank,
            ranks=ranks,
        )
        self.ema = ExponentialAverage(self.engine, trainer.ema_decay) if trainer.ema_decay else None
        self.behaviour = ExponentialAverage(self.engine, None) if config.rollout.ahead else None
        if saved is not None and checkpoint is not None:
            self.engine.load_state_dict(saved.optimizer)
            if self.ema is not None and saved.average is not None:  # else it starts at the weights
                self.ema.load(saved.average)
            if self.old is not None:  # a policy that had none starts as its own
                self.old.restart() if saved.old is None else self.old.load(saved.old)
            if self.behaviour is not None and saved.behaviour is not None:  # else the next batch is the policy's own
                self.behaviour.load(saved.behaviour)
            load_generators(checkpoint)

    def _shareable(self, held: Held, adapted: Iterable[str]) -> Held:
        """What of the engine's becomes the trainer's own too: it writes there only while the engine samples nothing."""
        trainer = self.config.trainer
        if trainer.engine is not TrainerEngineName.torch:
            return {}
        if trainer.lora_rank:
            return without_adapted(held, adapted)
        # Masters are shared where the engine holds all of their bits, and never samples with others, such as an average.
        alone = not trainer.ema_decay and not self.algorithm.keeps_old and not self.config.rollout.ahead
        return held if alone and self.dtype is torch.float32 else {}

    def expected(self, weights: str) -> dict[str, Any]:
        """What a trajectory's fingerprint must say for this learner, as it is set now, to score it bit for bit.

        Raises:
            PinnedKnobError: the exact profile cannot be had on this machine.
        """
        config = self.config
        found = {"dtype": config.model.dtype.value, "parity": config.parity.value, "weights": weights}
        return found if config.parity is Parity.fast else {**found, "machine": self._machine()}

    @contextmanager
    def _old_policy(self) -> Iterator[nn.Module]:
        assert self.old is not None
        with self.old.swapped():
            yield self.engine.module

    def _reference(self, start: nn.Module | None) -> Shown:
        """The policy the run started from: a copy, or under LoRA the base that the adapter is added to."""
        if start is not None:
            frozen = self.engine.frozen(start)
            return lambda: nullcontext(frozen)

        @contextmanager
        def base() -> Iterator[nn.Module]:
            with base_alone(self.policy):
                yield self.engine.module

        return base

    @contextmanager
    def as_sampled(self) -> Iterator[nn.Module]:
        """Before `step`, inside: the network with the weights that sampled the batch to learn from."""
        with nullcontext() if self.behaviour is None else self.behaviour.swapped():
            yield self.engine.module

    def needed(self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, step: int, *, recomputed: bool) -> set[int]:
        """See `PolicyUpdate.needed`."""
        return self.update.needed(trajectories, advantages, self._seed(step), recomputed=recomputed)

    def old_log_probs(
        self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, step: int, *, recomputed: bool
    ) -> list[torch.Tensor]:
        """What the ratio is taken to: the rollout's log-probs, or the trainer's own, by another forward pass."""
        if not recomputed:
            return [trajectory.log_probs for trajectory in trajectories]
        return self.update.recompute(trajectories, advantages, self._seed(step))

    def _seed(self, step: int) -> int:
        return derive_seed(self.config.sampling.seed, step, "mini-batches")

    def step(
        self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, old: Sequence[torch.Tensor], step: int
    ) -> tuple[Update, float]:
        """The update of step 1, 2, ..., and the learning rate it was made with."""
        if self.behaviour is not None:
            self.behaviour.restart()
        rate = learning_rate_at(self.config.trainer, step - 1)
        update = self.update(trajectories, advantages, old, learning_rate=rate, seed=self._seed(step))
        if self.ema is not None and any(math.isfinite(norm) for norm in update.grad_norms):
            self.ema.update()  # of weights that did not change, the average does not either
        if self.old is not None:
            self.old.update(self.algorithm.old_decay(step * self.config.trainer.updates_per_step))
        return update, rate

    @property
    def lags(self) -> bool:
        """Whether rollouts are sampled with another policy than the one that is trained."""
        return self.old is not None and self.algorithm.samples_with_old

    def weights(self, which: Which = "sampler") -> Iterator[tuple[str, torch.Tensor]]:
        """What an engine must hold to sample from one of the policies; sets `drift`. Collective, tensor by tensor."""
        sampler = self.old if self.lags else None
        shown = {"sampler": sampler, "policy": None, "average": self.ema, "behaviour": self.behaviour}[which]
        whole = self.config.trainer.ranks == 1 or self.config.trainer.engine is TrainerEngineName.torch
        with nullcontext() if shown is None else shown.swapped():
            for name, tensor in self.drift.watch(effective_weights(self.policy, self.dtype, self.engine.gathered)):
                # What was gathered goes, and what was swapped changes, when the next is asked for.
                yield name, tensor if whole and shown is None else tensor.clone()

    def adapter(self, which: Which = "sampler") -> Adapter | None:
        """Of a LoRA, what `weights` of the same policy are merged from. Collective; the first rank alone gets factors."""
        trainer = self.config.trainer
        if not trainer.lora_rank:
            return None
        sampler = self.old_state if self.lags else self.state
        by_policy = {"policy": self.state, "average": self.average_state, "behaviour": self.behaviour_state}
        factors = as_saved(self.policy, collected(by_policy.get(which, sampler)() or {}))
        return Adapter(factors=factors, rank=trainer.lora_rank, alpha=trainer.lora_alpha or 2 * trainer.lora_rank)

    def frozen(self) -> list[torch.Tensor]:
        """Weights that are never written and that no engine shares: what a LoRA is added to, the reference policy."""
        reference = [] if self._start is None else list(self._start.parameters())
        return [*self._own(trained=False), *reference]

    def moments(self) -> list[torch.Tensor]:
        """The optimizer's, of an engine that keeps its state on the device; none before the first update."""
        return self.engine.moments() if isinstance(self.engine, TorchEngine) else []

    def learned(self) -> list[torch.Tensor]:
        """What updates write, but for the optimizer's own: weights that no engine shares, and the policies beside them."""
        beside = [one.parts.values() for one in (self.ema, self.old, self.behaviour) if one is not None]
        return [*self._own(trained=True), *chain.from_iterable(beside)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, as they lie now: of a policy that is cut, the parts of this rank."""
        return [one for one in self.policy.parameters() if one.requires_grad]

    def _own(self, *, trained: bool) -> list[torch.Tensor]:
        shared = {tensor.untyped_storage().data_ptr() for tensor in self.shared.values()}
        parameters = [one for one in self.policy.parameters() if one.requires_grad is trained]
        return [one for one in parameters if one.untyped_storage().data_ptr() not in shared]

    def state(self) -> dict[str, Pending]:
        """The trained parameters by their name in the policy, fp32; every rank has the same, in the same order."""
        return self._whole(self.engine.parts())

    def average_state(self) -> dict[str, Pending] | None:
        """The same of the average, where one is kept."""
        return None if self.ema is None else self._whole(self.ema.parts)

    def old_state(self) -> dict[str, Pending] | None:
        """The same of the old policy, where the algorithm has one."""
        return None if self.old is None else self._whole(self.old.parts)

    def behaviour_state(self) -> dict[str, Pending] | None:
        """The same of the policy before the latest update, with rollout.ahead=1."""
        return None if self.behaviour is None else self._whole(self.behaviour.parts)

    def optimizer_state(self) -> dict[str, Pending]:
        return self.engine.state_dict()

    def save(self, folder: Path, run: RunState) -> None:
        """Collective; the first rank writes, and alone raises OSError where that fails."""
        beside = {"average": self.average_state(), "old": self.old_state(), "behaviour": self.behaviour_state()}
        save_policy(folder, self.policy, self.state(), run=run, optimizer=self.optimizer_state(), **beside)

    def _whole(self, parts: Mapping[str, torch.Tensor]) -> dict[str, Pending]:
        return {name: self.engine.whole(name, part) for name, part in parts.items()}
