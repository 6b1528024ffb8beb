"""AdamW under DeepSpeed's ZeRO stages 0 to 3, on the ranks of torch's process group, on CPUs or GPUs.

DeepSpeed keeps the optimizer's state, the gradients, and in stage 3 the parameters; the norm, the clipping and the moments'
names are those of `torch_engine`, so all engines give the same numbers and read each other's state.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from omni_rollout.config import Offload, TrainerConfig
from omni_rollout.diffusion.exact_ops import HasEffectiveWeight
from omni_rollout.policy.lora import MergedLoraLinear
from omni_rollout.policy.tensor_files import Pending, pending
from omni_rollout.policy.trainer_engines.deepspeed_config import deepspeed_config
from omni_rollout.policy.trainer_engines.torch_engine import (
    MOMENTS,
    adamw,
    by_expert,
    check_shape,
    check_state,
    clip_scale,
    fill_missing_gradients,
    moved,
    prepare,
    require_ready,
    total_norm,
    total_norm_of_parts,
    trainable_by_name,
)


class DeepSpeedEngine:
    """Takes the process group that is there, and makes one of its own, of one rank, only where there is none.

    The policy was loaded before: in stage 3, too, every rank holds all of it for a moment, in the memory where it lies.
    """

    def __init__(self, config: TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> None:
        self._named = trainable_by_name(policy, parameters)
        self._groups = by_expert(policy, self._named)
        self._shapes = {prefix: {name: p.shape for name, p in named.items()} for prefix, named in self._groups.items()}
        _join_world_of_one()
        self._deepspeed = _import_deepspeed()
        _forget_destroyed_groups(self._deepspeed)
        if config.zero_stage == 3:
            _gather_factors_with_their_layer(self._deepspeed, policy)
        self._optimizer = adamw(config, self._groups)
        trained = sum(parameter.numel() for parameter in parameters)
        self._settings = deepspeed_config(config.zero_stage, config.offload, trained)
        self._engine, *_ = self._deepspeed.initialize(
            model=policy, optimizer=self._optimizer, config=self._settings, dist_init_required=False
        )
        self.module: nn.Module = self._engine
        self._zero_stage, self._ranks = config.zero_stage, dist.get_world_size()
        # With it DeepSpeed hands its optimizer the gradients of those parameters alone that an update's last backward reached.
        self._hands_over_late = config.zero_stage > 1 and config.offload is not Offload.none
        self._max_grad_norm = config.max_grad_norm
        self._ready = False

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last and not self._hands_over_late)
        self._engine.backward(loss * self._ranks)  # DeepSpeed takes the mean over the ranks
        self._ready = last

    def step(self, learning_rate: float, idle: Collection[str] = ()) -> float:
        require_ready(self._ready)
        self._ready = False
        if self._zero_stage == 0:
            fill_missing_gradients(moved(self._groups, idle))
        if self._hands_over_late:
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.optimizer.finalize_gradient_accumulation_boundary()
        parameters = moved(self._groups, idle)
        gradients = [self._gradient(parameter) for parameter in parameters]
        cut = self._zero_stage > 0 and self._ranks > 1
        norm = total_norm_of_parts(gradients) if cut else total_norm(gradients)
        if not math.isfinite(norm) and self._zero_stage == 0:
            self._engine.zero_grad()
            return norm  # the other stages see for themselves that it is not finite, and skip the update in step()
        scale = clip_scale(norm, self._max_grad_norm)
        if math.isfinite(norm) and scale < 1:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                self._set_gradient(parameter, gradient * scale)
        prepare(self._optimizer, learning_rate, idle)
        self._engine.step()
        self._show_moments()
        self._forget_gradients()
        return norm

    def _forget_gradients(self) -> None:
        """Only an update's first backward overwrites them: an expert that comes later would add to what was left there."""
        if self._zero_stage == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        elif self._hands_over_late:
            for gradient in self._engine.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def parts(self) -> dict[str, torch.Tensor]:
        if self._zero_stage < 3:
            return {name: parameter.detach() for name, parameter in self._named.items()}
        return {name: cast(Any, parameter).ds_tensor.detach() for name, parameter in self._named.items()}

    def whole(self, name: str, part: torch.Tensor) -> Pending:
        if self._zero_stage < 3:
            return pending({name: part})[name]
        return Pending(tuple(self._shape(name)), part.dtype, partial(self._joined, part, self._shape(name)))

    def _joined(self, part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        flat = part.new_empty(part.numel() * self._ranks)
        dist.all_gather_into_tensor(flat, part.contiguous())
        return flat[: shape.numel()].view(shape)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        check_shape(name, whole, self._shape(name))
        if self._zero_stage < 3:
            return whole
        size = cast(Any, self._named[name]).ds_tensor.numel()
        return F.pad(whole.flatten(), (0, size * self._ranks - whole.numel())).narrow(0, size * dist.get_rank(), size)

    def _shape(self, name: str) -> torch.Size:
        return next(shapes[name] for shapes in self._shapes.values() if name in shapes)

    def gathered(self, layer: nn.Module) -> AbstractContextManager[None]:
        if self._zero_stage < 3:
            return nullcontext()
        read = layer.parameters(recurse=isinstance(layer, HasEffectiveWeight))
        return self._deepspeed.zero.GatheredParameters(list(read))

    def frozen(self, module: nn.Module) -> nn.Module:
        if self._zero_stage < 3:
            return module
        engine, *_ = self._deepspeed.initialize(model=module, config=self._settings, dist_init_required=False)
        return engine

    def state_dict(self) -> dict[str, Pending]:
        return dict(self._state())

    def _state(self) -> Iterator[tuple[str, Pending]]:
        for place, (prefix, named) in enumerate(self._groups.items()):
            states = [state for tensor in self._stepped(place) if (state := self._optimizer.state.get(tensor))]
            yield from pending({f"{prefix}step": states[0]["step"].long() if states else torch.tensor(0)}).items()
            for name, parameter in named.items() if states else ():
                shape = tuple(self._shape(name))
                yield from (
                    (f"{name}.{key}", Pending(shape, torch.float32, partial(self._moment, parameter, key))) for key in MOMENTS
                )

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        check_state(state, self._shapes)
        for place, (prefix, named) in enumerate(self._groups.items()):
            step = int(state[f"{prefix}step"])
            if step == 0 and not any(self._optimizer.state.get(tensor) for tensor in self._stepped(place)):
                continue
            self._allocate_moments(place, step)
            for name, parameter in named.items():
                for key in MOMENTS if step else ():
                    value = state[f"{name}.{key}"].to(parameter)
                    if self._zero_stage == 0:
                        self._optimizer.state[parameter][key].copy_(value)
                    else:
                        safe_set_full_optimizer_state(parameter, value, key)

    def _stepped(self, place: int) -> list[torch.Tensor]:
        """What the optimizer steps of its group at `place`; under ZeRO flat partitions, in stage 3 lent to it for the step."""
        if self._zero_stage < 3:
            return self._optimizer.param_groups[place]["params"]
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat
        return [tensor for number, tensor in enumerate(flat) if zero.sub_group_to_group_id[number] == place]

    def _moment(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._zero_stage == 0:
            return self._optimizer.state[parameter][key]
        return cast(torch.Tensor, safe_get_full_optimizer_state(parameter, key))

    def _allocate_moments(self, place: int, step: int) -> None:
        """Makes AdamW's state as its first step would."""
        for tensor in self._stepped(place):
            state = self._optimizer.state[tensor]
            if not state:
                state.update({key: torch.zeros_like(tensor) for key in MOMENTS})
            for key in MOMENTS:
                state[key].zero_()
            state["step"] = torch.tensor(float(step))
        self._show_moments()

    def _show_moments(self) -> None:
        """ZeRO's stages 1 and 2 look for them once, after the first step: those of an expert that was idle came later."""
        if self._zero_stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """Of the whole update, what this rank holds."""
        from deepspeed.utils import safe_get_local_grad

        if self._zero_stage == 0:
            return cast(torch.Tensor, parameter.grad)
        if self._zero_stage == 3:
            return cast(torch.Tensor, safe_get_local_grad(parameter))
        place = cast(Any, parameter)
        if place._hp_mapping is None:  # all of it lies on other ranks
            return torch.zeros(0, device=parameter.device)
        return place._hp_mapping.get_lp_grad_fragment(place._index_in_param_group)

    def _set_gradient(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        if self._zero_stage == 3:
            safe_set_local_grad(parameter, value)
        else:
            self._gradient(parameter).copy_(value)


def _gather_factors_with_their_layer(deepspeed: Any, policy: nn.Module) -> None:
    """A LoRA layer reads its factors, which are modules of their own, without calling them.

    ZeRO gives a layer's parameters back in backward when the gradient of its input is there, or at once, too early, where the
    input has none: as in the first block, with nothing to train before it. So every input gets one.
    """
    for layer in policy.modules():
        if isinstance(layer, MergedLoraLinear):
            layer.register_forward_pre_hook(_input_with_gradient)
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)


def _input_with_gradient(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x, *rest = inputs
    return (x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x, *rest)


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
    # A shared-memory all-reduce, compiled for a minute at start-up; torch's own is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _forget_destroyed_groups(deepspeed: Any) -> None:
    """DeepSpeed keeps the groups it made, also when their world is destroyed, and they with it."""
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
