"""Policy, optimizer and average of one run: what every back end trains with, whatever brings it the trajectories."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from omni_rollout.collate import derive_seed
from omni_rollout.config import TrainConfig
from omni_rollout.exact_ops import effective_weights
from omni_rollout.models import family_module
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.engines import learning_rate_at, make_trainer_engine
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.recompute import recompute
from omni_rollout.policy.update import PolicyUpdate, Update
from omni_rollout.types import Trajectory


class Learner:
    """Loads the policy that `config` names.

    Args:
        algorithm: a module of `omni_rollout.algorithms`, the one that `config` names.
        rank, ranks: of torch's process group, which must exist when there is more than one. Every rank holds the whole
            policy and is given all rows; it scores its share of them, and the gradients are summed.
    """

    def __init__(self, config: TrainConfig, algorithm: ModuleType, *, rank: int = 0, ranks: int = 1) -> None:
        self.config = config
        trainer = config.trainer
        self.dtype: torch.dtype = getattr(torch, config.model.dtype.value)
        torch.manual_seed(config.sampling.seed)
        load = family_module(config.model.family, "policy").load_policy
        self.policy = load(config.model.path, self.dtype, config.parity.value)
        if torch.cuda.is_available():
            self.policy.to("cuda")
        reference = copy.deepcopy(self.policy).requires_grad_(False) if config.algorithm.kl_coef else None
        if trainer.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        if trainer.lora_rank:
            seed = config.sampling.seed
            self.parameters = attach_lora(self.policy, rank=trainer.lora_rank, alpha=trainer.lora_alpha, seed=seed)
        else:
            self.parameters = list(self.policy.parameters())
        self.update = PolicyUpdate(
            make_trainer_engine(trainer, self.policy, self.parameters),
            algorithm,
            trainer,
            config.algorithm,
            family=config.model.family,
            dtype=self.dtype,
            reference=reference,
            rank=rank,
            ranks=ranks,
        )
        self.ema = ExponentialAverage(self.parameters, trainer.ema_decay) if trainer.ema_decay else None

    def old_log_probs(self, trajectories: Sequence[Trajectory], *, recomputed: bool) -> list[torch.Tensor]:
        """What the ratio is taken to: the rollout's log-probs, or the trainer's own, by another forward pass."""
        if not recomputed:
            return [trajectory.log_probs for trajectory in trajectories]
        size, family = self.config.trainer.micro_batch_size, self.config.model.family
        return recompute(self.policy, trajectories, family=family, dtype=self.dtype, micro_batch_size=size)

    def step(
        self, trajectories: Sequence[Trajectory], advantages: torch.Tensor, old: Sequence[torch.Tensor], step: int
    ) -> tuple[Update, float]:
        """The update of step 1, 2, ..., and the learning rate it was made with."""
        rate = learning_rate_at(self.config.trainer, step - 1)
        seed = derive_seed(self.config.sampling.seed, step, "mini-batches")
        update = self.update(trajectories, advantages, old, learning_rate=rate, seed=seed)
        if self.ema is not None:
            self.ema.update()
        return update, rate

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a rollout engine must hold to sample from this policy."""
        return effective_weights(self.policy, self.dtype)

    def averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Inside, the policy is its average, if that is wanted and one is kept."""
        return self.ema.swapped() if wanted and self.ema is not None else nullcontext()
