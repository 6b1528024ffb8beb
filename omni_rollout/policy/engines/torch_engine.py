"""AdamW in plain PyTorch: the engine for one process, and what the engines for several share with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class TorchEngine:
    def __init__(self, config: TrainerConfig, policy: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.module = policy
        self._named = trainable_by_name(policy, parameters)
        self._optimizer = adamw(config, parameters)
        self._max_grad_norm = config.max_grad_norm
        self._ready = False

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        self._ready = last

    def step(self, learning_rate: float) -> float:
        require_ready(self._ready)
        self._ready = False
        gradients = [self._held(gradient) for gradient in fill_missing_gradients(self._named.values())]
        norm = self._norm(gradients)
        if math.isfinite(norm):
            scale = clip_scale(norm, self._max_grad_norm)
            if scale < 1:
                for gradient in gradients:
                    gradient.mul_(scale)
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def parts(self) -> dict[str, torch.Tensor]:
        return {name: self._held(parameter.detach()) for name, parameter in self._named.items()}

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return part

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        check_shape(name, whole, self._named[name].shape)
        return whole

    def gathered(self, layer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def frozen(self, module: nn.Module) -> nn.Module:
        return module

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = {name: self._optimizer.state[parameter] for name, parameter in self._named.items()}
        if not all(states.values()):
            return {"step": torch.tensor(0)} if first_rank() else {}
        step = next(iter(states.values()))["step"].long()
        moments = (
            (f"{name}.{key}", self.whole(name, self._held(state[key]))) for name, state in states.items() for key in MOMENTS
        )
        return on_first_rank(chain([("step", step)], moments))

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        check_state(state, {name: parameter.shape for name, parameter in self._named.items()})
        for name, parameter in self._named.items():
            if int(state["step"]) == 0:
                self._optimizer.state.pop(parameter, None)
                continue
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            for key, moment in moments.items():
                self._held(moment).copy_(self.part(name, state[f"{name}.{key}"]))
            self._optimizer.state[parameter] = {"step": state["step"].float().cpu(), **moments}

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


def first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, made one at a time; empty on the other ranks, which take part in making each."""
    keep = first_rank()
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors if keep}


def adamw(config: TrainerConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(beta1, beta2), weight_decay=config.weight_decay, foreach=False
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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


def check_state(state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    if "step" not in state:
        raise UserError("optimizer state has no `step`: expected what TrainerEngine.state_dict() returned")
    moments = {f"{name}.{key}": shape for name, shape in shapes.items() for key in MOMENTS} if int(state["step"]) else {}
    for name, shape in moments.items():
        if name not in state:
            raise UserError(f"optimizer state has no {name}: it was saved for another set of trainable parameters")
        check_shape(f"optimizer state {name}", state[name], shape)
    for name in state:
        if name != "step" and name not in moments:
            raise UserError(
                f"optimizer state has {name}, which is not trained here: it was saved for another set of parameters"
            )
