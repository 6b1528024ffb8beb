"""Trainer engines: one small interface, one file per engine, the same numbers from each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout import config as configs
from omni_rollout.errors import UserError
from omni_rollout.launch.validate import trainer_engine
from omni_rollout.policy.tensor_files import Pending


class TrainerEngine(Protocol):
    """Holds the optimizer. One update is any number of `backward`, the last one marked, and one `step`."""

    @property
    def module(self) -> nn.Module:
        """What to call forward on: the policy, wrapped if the engine needs to see the call."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss` [] to those of this update; `last` marks the update's last call.

        Losses are summed: a mini-batch cut into micro-batches weighs each by its share.
        """
        ...

    def step(self, learning_rate: float, idle: Collection[str] = ()) -> float:
        """Clips by max_grad_norm, updates, clears the gradients, and returns the norm before clipping.

        `idle`: folders of experts that no loss of this update went through; they stay as they are, moments and all.

        With a norm that is not finite nothing is updated; it is returned all the same, for the caller to count.

        Raises:
            RuntimeError: no `backward(..., last=True)` since the last step.
        """
        ...

    def parts(self) -> dict[str, torch.Tensor]:
        """What this rank holds of each trained parameter, by its name in the policy; what is written there is computed with."""
        ...

    def whole(self, name: str, part: torch.Tensor) -> Pending:
        """The tensor of which each rank holds a part that lies like its part of parameter `name`."""
        ...

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's cut of a tensor shaped like parameter `name`.

        Raises:
            UserError: it has another shape.
        """
        ...

    def gathered(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Inside, the parameters that `layer` itself computes with are whole. Collective; to be nested as layers are."""
        ...

    def frozen(self, module: nn.Module) -> nn.Module:
        """A module that is never trained, held as the policy is: in parts where the policy is. Call what is returned."""
        ...

    def state_dict(self) -> dict[str, Pending]:
        """The optimizer's state: `step` [] int64, and if that is not 0 `<parameter>.exp_avg|exp_avg_sq`, fp32.

        Each of several experts has a step of its own, `<folder>.step`. Every engine reads every other's.
        """
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises UserError, naming the first key that does not fit, before anything is changed."""
        ...


def make_trainer_engine(config: configs.TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> TrainerEngine:
    """The engine that `config.engine` names, over the trainable `parameters` of `policy`.

    With `config.ranks` above 1 torch's process group must be there, the policy the same on every rank; each is given losses of
    its own share of the rows, with the same number of forward and backward passes on every rank, and takes the same step.
    """
    problems = list(trainer_engine(config))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if config.ranks != ranks:
        problems.append(f"trainer.ranks={config.ranks}: torch's process group has {ranks}; start as many processes as ranks")
    if problems:
        raise UserError("\n".join(problems))
    if config.engine is configs.TrainerEngineName.deepspeed:
        from omni_rollout.policy.trainer_engines.deepspeed_engine import DeepSpeedEngine  # its import takes seconds

        return DeepSpeedEngine(config, policy, parameters)
    if config.engine is configs.TrainerEngineName.fsdp2:
        from omni_rollout.policy.trainer_engines.fsdp2_engine import FSDP2Engine

        return FSDP2Engine(config, policy, parameters)
    if config.ranks > 1:
        from omni_rollout.policy.trainer_engines.data_parallel_engine import DataParallelEngine

        return DataParallelEngine(config, policy, parameters)
    from omni_rollout.policy.trainer_engines.torch_engine import TorchEngine

    return TorchEngine(config, policy, parameters)


def learning_rate_at(config: configs.TrainerConfig, step: int) -> float:
    """Of the run's step 0, 1, ..., steps-1.

    Rises in equal parts over `warmup_steps`, reaching the full rate at the last of them; then stays (constant), or falls
    in a straight line to a tenth at the run's last step (linear).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule is configs.Schedule.constant:
        return config.learning_rate
    peak, last = max(config.warmup_steps - 1, 0), config.steps - 1
    share = min((step - peak) / (last - peak), 1.0) if last > peak else 0.0
    return config.learning_rate * (1.0 - 0.9 * share)
