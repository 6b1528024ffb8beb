"""AdamW under DeepSpeed's ZeRO stages 0, 1 and 2, on a CPU or one GPU, in a world of one.

DeepSpeed keeps the optimizer's state and the gradients; the norm, the clipping and the moments' names are those of
`torch_engine`, through DeepSpeed's own accessors, so both engines give the same numbers and read each other's state.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.errors import UserError
from omni_rollout.policy.engines.torch_engine import (
    MOMENTS,
    adamw,
    check_state,
    clip_scale,
    fill_missing_gradients,
    require_ready,
    set_learning_rate,
    total_norm,
    trainable_by_name,
)


class DeepSpeedEngine:
    """Takes the process group that is there, and makes one of its own only where there is none.

    Raises:
        UserError: a ZeRO stage above 2, or a process group of more than one rank.
    """

    def __init__(self, config: TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> None:
        if config.zero_stage not in (0, 1, 2):
            raise UserError(
                f"trainer.zero_stage={config.zero_stage}: expected 0, 1 or 2. This trainer is a world of one, where sharding "
                "the weights (stage 3) saves nothing; for several GPUs use backend=verl"
            )
        self._named = trainable_by_name(policy, parameters)
        _join_world_of_one()
        deepspeed = _import_deepspeed()
        _forget_destroyed_groups(deepspeed)
        self._optimizer = adamw(config, parameters)
        self._engine, *_ = deepspeed.initialize(
            model=policy, optimizer=self._optimizer, config=_deepspeed_config(config.zero_stage), dist_init_required=False
        )
        self.module: nn.Module = self._engine
        self._zero_stage = config.zero_stage
        self._max_grad_norm = config.max_grad_norm
        self._ready = False

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        self._ready = last

    def step(self, learning_rate: float) -> float:
        require_ready(self._ready)
        self._ready = False
        if self._zero_stage == 0:
            fill_missing_gradients(self._named.values())
        norm = total_norm(_gradient(parameter) for parameter in self._named.values())
        if not math.isfinite(norm) and self._zero_stage == 0:
            self._engine.zero_grad()
            return norm  # stages 1 and 2 see for themselves that it is not finite, and skip the update in step()
        scale = clip_scale(norm, self._max_grad_norm)
        if math.isfinite(norm) and scale < 1:
            from deepspeed.utils import safe_set_full_grad

            for parameter in self._named.values():
                safe_set_full_grad(parameter, _gradient(parameter) * scale)
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        return norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = list(self._optimizer.state.values())
        if not any(states):
            return {"step": torch.tensor(0)}
        flat = {f"{name}.{key}": self._moment(parameter, key) for name, parameter in self._named.items() for key in MOMENTS}
        return {"step": states[0]["step"].long().cpu(), **flat}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        check_state(state, self._named)
        step = int(state["step"])
        if step == 0 and not self._optimizer.state:
            return
        self._allocate_moments(step)
        for name, parameter in self._named.items():
            for key in MOMENTS if step else ():
                value = state[f"{name}.{key}"].to(parameter)
                if self._zero_stage == 0:
                    self._optimizer.state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _moment(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._zero_stage == 0:
            return self._optimizer.state[parameter][key].detach().clone()
        return cast(torch.Tensor, safe_get_full_optimizer_state(parameter, key))

    def _allocate_moments(self, step: int) -> None:
        """Makes AdamW's state as its first step would, and shows it to ZeRO, which learns of it only in a step."""
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:  # under ZeRO: the flat fp32 partitions
                state = self._optimizer.state[tensor]
                if not state:
                    state.update({key: torch.zeros_like(tensor) for key in MOMENTS})
                for key in MOMENTS:
                    state[key].zero_()
                state["step"] = torch.tensor(float(step))
        if self._zero_stage > 0:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Of the whole update, wherever the stage keeps it: a copy or the thing itself."""
    from deepspeed.utils import safe_get_full_grad

    return cast(torch.Tensor, safe_get_full_grad(parameter))


def _deepspeed_config(zero_stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and unused: the caller weighs its micro-batches
        "gradient_accumulation_steps": 1,  # the boundary is set before each backward
        # A torch optimizer is not on DeepSpeed's list; one that DeepSpeed builds is compiled for minutes.
        "zero_allow_untested_optimizer": True,
        # The memory-efficient linear replaces F.linear for the whole process, the rollout's included.
        "zero_optimization": {"stage": zero_stage, "memory_efficient_linear": False},
        "gradient_clipping": 0.0,  # clipped in step(); left out, it would be 1.0
        "steps_per_print": 10**9,
    }


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # before the import: else it looks for other devices
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    chosen = cast(Any, get_accelerator()).device_name()
    if not torch.cuda.is_available() and chosen != "cpu":
        raise RuntimeError(
            f"deepspeed was imported earlier and chose the device {chosen!r}, but torch sees no GPU; "
            "set DS_ACCELERATOR=cpu in the environment"
        )
    # A shared-memory all-reduce, compiled for a minute at start-up; there is nobody to share with.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _forget_destroyed_groups(deepspeed: Any) -> None:
    """DeepSpeed keeps the groups it made; closing a rollout engine of this process destroys their world, and them with it."""
    world = dist.group.WORLD
    if getattr(deepspeed, "_omni_rollout_world", world) is not world:
        deepspeed.comm.comm.cdb = None
        importlib.reload(deepspeed.utils.groups)
    deepspeed._omni_rollout_world = world


def _join_world_of_one() -> None:
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]: in torch's documentation
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise UserError(
            f"the process group has {dist.get_world_size()} ranks: this trainer is a world of one; "
            "start one process, or use backend=verl for several"
        )
