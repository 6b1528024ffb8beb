"""Policy, optimizer and average of one run: what every back end trains with, whatever brings it the trajectories."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from omni_rollout.config import Parity, TrainConfig, TrainerEngineName
from omni_rollout.data.collate import derive_seed
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import compute_device
from omni_rollout.diffusion.self_check import checker
from omni_rollout.models import family_module
from omni_rollout.policy.checkpoint import load_generators, load_policy, save_policy
from omni_rollout.policy.drift import Drift
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.engines import learning_rate_at, make_trainer_engine
from omni_rollout.policy.engines.torch_engine import first_rank, on_first_rank
from omni_rollout.policy.lora import attach_lora, base_alone
from omni_rollout.policy.recompute import recompute
from omni_rollout.policy.rng import seed_generators
from omni_rollout.policy.state import RunState
from omni_rollout.policy.update import PolicyUpdate, Update
from omni_rollout.types import Trajectory


class Learner:
    """Loads the policy that `config` names.

    Args:
        algorithm: a module of `omni_rollout.algorithms`, the one that `config` names.
        rank, ranks: of torch's process group, which must exist when there is more than one. Every rank loads the whole
            policy and is given all rows; it scores its share of them, and the gradients are summed. What it keeps of the
            policy is the trainer engine's matter.
        checkpoint: to go on from; the reference of a KL term stays the policy that `config` names.
    """

    def __init__(
        self, config: TrainConfig, algorithm: ModuleType, *, rank: int = 0, ranks: int = 1, checkpoint: Path | None = None
    ) -> None:
        self.config = config
        trainer = config.trainer
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        seed_generators(config.sampling.seed)
        load = family_module(config.model.family, "policy").load_policy
        self.policy = load(config.model.path, self.dtype, config.parity.value)
        self._device = compute_device()
        if trainer.engine is not TrainerEngineName.fsdp2:
            self.policy.to(self._device)
        self.drift = Drift(effective_weights(self.policy, self.dtype))
        start = copy.deepcopy(self.policy).requires_grad_(False) if config.algorithm.kl_coef and not trainer.lora_rank else None
        if trainer.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        if trainer.lora_rank:
            seed = config.sampling.seed
            self.parameters = attach_lora(self.policy, rank=trainer.lora_rank, alpha=trainer.lora_alpha, seed=seed)
        else:
            self.parameters = list(self.policy.parameters())
        saved = load_policy(checkpoint, self.policy) if checkpoint is not None else None
        self._machine = checker(self.policy, self.dtype, self._device)
        self.engine = make_trainer_engine(trainer, self.policy, self.parameters)
        self.update = PolicyUpdate(
            self.engine,
            algorithm,
            trainer,
            config.algorithm,
            family=config.model.family,
            dtype=self.dtype,
            reference=self._reference(start) if config.algorithm.kl_coef else None,
            rank=rank,
            ranks=ranks,
        )
        self.ema = ExponentialAverage(self.engine, trainer.ema_decay) if trainer.ema_decay else None
        if saved is not None and checkpoint is not None:
            self.engine.load_state_dict(saved.optimizer)
            if self.ema is not None and saved.average is not None:  # else it starts at the weights
                self.ema.load(saved.average)
            load_generators(checkpoint)

    def expected(self, weights: str) -> dict[str, Any]:
        """What a trajectory's fingerprint must say for this learner, as it is set now, to score it bit for bit.

        Raises:
            PinnedKnobError: the exact profile cannot be had on this machine.
        """
        config = self.config
        found = {"dtype": config.model.dtype.value, "parity": config.parity.value, "weights": weights}
        return found if config.parity is Parity.fast else {**found, "machine": self._machine()}

    def _reference(self, start: nn.Module | None) -> Callable[[], AbstractContextManager[nn.Module]]:
        """The policy the run started from: a copy, or under LoRA the base that the adapter is added to."""
        if start is not None:
            frozen = self.engine.frozen(start)
            return lambda: nullcontext(frozen)

        @contextmanager
        def base() -> Iterator[nn.Module]:
            with base_alone(self.policy):
                yield self.engine.module

        return base

    def old_log_probs(self, trajectories: Sequence[Trajectory], *, recomputed: bool) -> list[torch.Tensor]:
        """What the ratio is taken to: the rollout's log-probs, or the trainer's own, by another forward pass."""
        if not recomputed:
            return [trajectory.log_probs for trajectory in trajectories]
        size, family = self.config.trainer.micro_batch_size, self.config.model.family
        return recompute(self.engine.module, trajectories, family=family, dtype=self.dtype, micro_batch_size=size)

    def step(
        self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, old: Sequence[torch.Tensor], step: int
    ) -> tuple[Update, float]:
        """The update of step 1, 2, ..., and the learning rate it was made with."""
        rate = learning_rate_at(self.config.trainer, step - 1)
        seed = derive_seed(self.config.sampling.seed, step, "mini-batches")
        update = self.update(trajectories, advantages, old, learning_rate=rate, seed=seed)
        if self.ema is not None and any(math.isfinite(norm) for norm in update.grad_norms):
            self.ema.update()  # of weights that did not change, the average does not either
        return update, rate

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a rollout engine must hold to sample from this policy; sets `drift`. Collective, tensor by tensor."""
        named = self.drift.watch(effective_weights(self.policy, self.dtype, self.engine.gathered))
        # What was gathered goes when the next is asked for.
        return named if self.config.trainer.ranks == 1 else ((name, tensor.clone()) for name, tensor in named)

    def state(self) -> dict[str, torch.Tensor]:
        """The trained parameters by their name in the policy: whole, fp32, on the CPU.

        Collective, like the two below: every rank calls them, in the same order; ranks other than the first get none.
        """
        return self._whole(self.engine.parts())

    def average_state(self) -> dict[str, torch.Tensor] | None:
        """The same of the average, where one is kept."""
        return None if self.ema is None else self._whole(self.ema.parts)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self.engine.state_dict()

    def save(self, folder: Path, run: RunState) -> None:
        """Collective; the first rank writes, and alone raises OSError where that fails."""
        weights, average, optimizer = self.state(), self.average_state(), self.optimizer_state()
        if first_rank():
            save_policy(folder, self.policy, weights, run=run, optimizer=optimizer, average=average)

    def _whole(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return on_first_rank((name, self.engine.whole(name, part)) for name, part in parts.items())

    def averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside, the policy is its average, if that is wanted and one is kept."""
        return self.ema.swapped() if wanted and self.ema is not None else nullcontext()
