"""AdamW in plain PyTorch: the engine for one process, and what the engines for several share with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.errors import UserError
from omni_rollout.models.base.policy import experts
from omni_rollout.policy.tensor_files import Pending, pending

MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchEngine:
    def __init__(self, config: TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.module = policy
        self._named = trainable_by_name(policy, parameters)
        self._groups = by_expert(policy, self._named)
        self._optimizer = adamw(config, self._groups)
        self._max_grad_norm = config.max_grad_norm
        self._ready = False

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        self._ready = last

    def step(self, learning_rate: float, idle: Collection[str] = ()) -> float:
        require_ready(self._ready)
        self._ready = False
        gradients = [self._held(gradient) for gradient in fill_missing_gradients(moved(self._groups, idle))]
        norm = self._norm(gradients)
        if math.isfinite(norm):
            scale = clip_scale(norm, self._max_grad_norm)
            if scale < 1:
                for gradient in gradients:
                    gradient.mul_(scale)
            prepare(self._optimizer, learning_rate, idle)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def parts(self) -> dict[str, torch.Tensor]:
        return {name: self._held(parameter.detach()) for name, parameter in self._named.items()}

    def whole(self, name: str, part: torch.Tensor) -> Pending:
        return pending({name: part})[name]

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        check_shape(name, whole, self._named[name].shape)
        return whole

    def gathered(self, layer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def frozen(self, module: nn.Module) -> nn.Module:
        return module

    def state_dict(self) -> dict[str, Pending]:
        return dict(chain.from_iterable(self._state(*group) for group in self._groups.items()))

    def moments(self) -> list[torch.Tensor]:
        """AdamW's, on the device; none before the first update."""
        return [state[key] for state in self._optimizer.state.values() for key in MOMENTS if key in state]

    def _state(self, prefix: str, named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Pending]]:
        states = {name: self._optimizer.state[parameter] for name, parameter in named.items()}
        begun = all(states.values())
        yield from pending({f"{prefix}step": next(iter(states.values()))["step"].long() if begun else torch.tensor(0)}).items()
        for name, state in states.items() if begun else ():
            yield from ((f"{name}.{key}", self.whole(name, self._held(state[key]))) for key in MOMENTS)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        check_state(state, {prefix: {name: p.shape for name, p in named.items()} for prefix, named in self._groups.items()})
        for prefix, named in self._groups.items():
            step = state[f"{prefix}step"]
            for name, parameter in named.items():
                if int(step) == 0:
                    self._optimizer.state.pop(parameter, None)
                    continue
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
                for key, moment in moments.items():
                    self._held(moment).copy_(self.part(name, state[f"{name}.{key}"]))
                self._optimizer.state[parameter] = {"step": step.float().cpu(), **moments}

    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a parameter, its gradient or its moment."""
        return tensor

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        return total_norm(gradients)


def trainable_by_name(policy: nn.Module, parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    """In the order of `parameters`.

    Raises:
        UserError: no parameters, one that is not the policy's, is frozen, or is not fp32.
    """
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    named: dict[str, nn.Parameter] = {}
    for index, parameter in enumerate(parameters):
        name = names.get(id(parameter))
        if name is None:
            raise UserError(f"trainable parameter {index} is not a parameter of the policy; give policy.parameters()")
        if not parameter.requires_grad:
            raise UserError(f"{name} is frozen (requires_grad=False); leave it out of the trainable parameters")
        if parameter.dtype != torch.float32:
            raise UserError(f"{name} is {parameter.dtype}: expected float32 master weights; load the policy in float32")
        named[name] = parameter
    if not named:
        raise UserError("there is nothing to train: the list of trainable parameters is empty")
    return named


def by_expert(policy: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """What an expert's names begin with (nothing, in a policy of one) -> its trainable parameters by name."""
    folders = list(experts(policy))
    prefixes = [f"{folder}." for folder in folders] if len(folders) > 1 else [""]
    return {prefix: {name: p for name, p in named.items() if name.startswith(prefix)} for prefix in prefixes}


class AdamW(torch.optim.AdamW):
    """Leaves a group that is marked idle as it is: no decay, no moment, and no step that its bias correction would count."""

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["idle"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def adamw(config: TrainerConfig, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> AdamW:
    """One group for each expert; see `by_expert`."""
    beta1, beta2 = config.betas
    return AdamW(
        [{"params": list(named.values()), "expert": prefix.rstrip("."), "idle": False} for prefix, named in groups.items()],
        lr=config.learning_rate,
        betas=(beta1, beta2),
        weight_decay=config.weight_decay,
        foreach=False,
    )


def prepare(optimizer: torch.optim.Optimizer, learning_rate: float, idle: Collection[str]) -> None:
    """For the next step: its rate, and the experts that it leaves alone."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["idle"] = group["expert"] in idle


def moved(groups: Mapping[str, Mapping[str, nn.Parameter]], idle: Collection[str]) -> list[nn.Parameter]:
    """The parameters of the experts that are not idle."""
    return [p for prefix, named in groups.items() if prefix.rstrip(".") not in idle for p in named.values()]


def require_ready(ready: bool) -> None:
    if not ready:
        raise RuntimeError("step() before backward(loss, last=True): mark the last backward pass of the update")


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Zeros where the loss does not reach (the last block's text branch), so that every engine decays the same weights."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def total_norm(gradients: Iterable[torch.Tensor]) -> float:
    """Euclidean norm of all gradients together: tensor by tensor in fp32, then over the tensors."""
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def total_norm_of_parts(gradients: Iterable[torch.Tensor]) -> float:
    """`total_norm` of tensors of which every rank holds parts; the parts' squares are summed in fp64. Collective."""
    squares = torch.stack([gradient.double().square().sum() for gradient in gradients])
    dist.all_reduce(squares)
    return float(squares.sqrt().float().norm())


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients by, as torch.nn.utils.clip_grad_norm_ does; 1 leaves them as they are."""
    return min(max_norm / (norm + 1e-6), 1.0)


def check_shape(name: str, tensor: torch.Tensor, expected: torch.Size) -> None:
    if tensor.shape != expected:
        raise UserError(f"{name} is {list(tensor.shape)}: expected {list(expected)}")


def check_state(state: Mapping[str, torch.Tensor], groups: Mapping[str, Mapping[str, torch.Size]]) -> None:
    """Raises UserError, naming the first key of an optimizer's state that does not fit; `groups`: as `by_expert`, of shapes."""
    known: set[str] = set()
    for prefix, shapes in groups.items():
        if f"{prefix}step" not in state:
            raise UserError(f"optimizer state has no `{prefix}step`: expected what TrainerEngine.state_dict() returned")
        known.add(f"{prefix}step")
        for name, shape in shapes.items() if int(state[f"{prefix}step"]) else ():
            for moment in (f"{name}.{key}" for key in MOMENTS):
                if moment not in state:
                    raise UserError(f"optimizer state has no {moment}: it was saved for another set of trainable parameters")
                check_shape(f"optimizer state {moment}", state[moment], shape)
                known.add(moment)
    for name in state:
        if name not in known:
            raise UserError(
                f"optimizer state has {name}, which is not trained here: it was saved for another set of parameters"
            )
