"""One image, followed through both sides: the first thing that differs is the culprit.

In the order in which data flows: weights, schedule, what the transformer is told, each module of it, guidance, the
stored latents, the step. Whatever differs first made all that follows differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from omni_rollout.diffusion import attention
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models import family_module
from omni_rollout.models.base import velocity as base
from omni_rollout.models.base.causes import swapped
from omni_rollout.models.base.policy import conditioning, experts
from omni_rollout.models.base.velocity import expert_at
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.digest import tensor_digest
from omni_rollout.types import RolloutRequest, Trajectory


@dataclass
class Call:
    """One forward pass of a transformer."""

    expert: int  # position of that transformer
    inputs: dict[str, Any]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # module -> output, in the order they were computed
    rope_calls: int = 0
    attention_calls: int = 0


@dataclass
class EngineStep:
    velocity: torch.Tensor  # [1, S, C] after guidance
    before: torch.Tensor  # [1, S, C] fp32
    after: torch.Tensor


@dataclass
class Trace:
    """What both sides did for one request, with its trajectory."""

    trajectory: Trajectory
    log_probs: torch.Tensor  # [T] by the trainer
    engine_calls: list[Call]  # of all N steps
    engine_steps: list[EngineStep]
    trainer_calls: list[Call]  # of the T stochastic steps
    trainer_velocities: list[torch.Tensor]


@contextmanager
def recorded(transformers: Sequence[nn.Module], probe: Any, *, engine: bool) -> Iterator[list[Call]]:
    """Every forward pass of any of the experts `transformers`, under the trainer's names."""
    calls: list[Call] = []
    running: list[Call] = []  # empty between forward passes: the text encoder attends too

    def begin(transformer: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        expert = next(place for place, own in enumerate(transformers) if own is transformer)
        running[:] = [Call(expert, {name: _kept(value) for name, value in probe.told(inputs).items()})]
        calls.extend(running)

    def end(*_: Any) -> None:
        running.clear()

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if running and isinstance(tensor, torch.Tensor):
                named = probe.trainer_outputs(name, tensor) if engine else ((name, tensor),)
                running[0].outputs.update({key: _kept(value) for key, value in named})

        return hook

    def keep_rope(output: torch.Tensor) -> None:
        if running:
            running[0].outputs[probe.rope_name(running[0].rope_calls)] = _kept(output)
            running[0].rope_calls += 1

    def listened(own: Callable[..., torch.Tensor], heads: int) -> Callable[..., torch.Tensor]:
        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = own(*args, **kwargs)
            if running:
                running[0].outputs[probe.attention_name(running[0].attention_calls)] = _kept(output.transpose(1, heads))
                running[0].attention_calls += 1
            return output

        return attend

    def change_rope(rope: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def rotate(*args: torch.Tensor) -> torch.Tensor:
            output = rope(*args)
            keep_rope(output)
            return output

        return rotate

    with ExitStack() as stack:
        handles: list[Any] = []
        for transformer in transformers:
            handles += [transformer.register_forward_pre_hook(begin, with_kwargs=True), transformer.register_forward_hook(end)]
            for name, module in transformer.named_modules():
                if name:
                    handles.append(module.register_forward_hook(keep(name)))
            for module in probe.rope_calls(transformer):
                handles.append(module.register_forward_hook(lambda _, __, output: keep_rope(output)))
        for handle in handles:
            stack.callback(handle.remove)
        for owner, name, heads in ((F, "scaled_dot_product_attention", 1), (attention, "attention_by_products", 2)):
            stack.enter_context(swapped(owner, name, listened(getattr(owner, name), heads)))
        stack.enter_context(probe.swapped_rope(change_rope))
        yield calls


@contextmanager
def recorded_steps(pipeline: Any) -> Iterator[list[EngineStep]]:
    steps: list[EngineStep] = []
    step_scheduler = pipeline.step_scheduler

    def recording(state: Any, noise_pred: torch.Tensor, **kwargs: Any) -> None:
        before = _kept(state.latents)
        step_scheduler(state, noise_pred, **kwargs)
        steps.append(EngineStep(_kept(noise_pred), before, _kept(state.latents)))

    with swapped(pipeline, "step_scheduler", recording):
        yield steps


def trace(engine: RolloutEngine, policy: nn.Module, request: RolloutRequest, family: str, dtype: torch.dtype) -> Trace:
    """Samples the request alone, and scores it one step at a time; raises what the engine raises."""
    probe, pipeline = family_module(family, "probe"), engine.pipeline
    networks = list(pipeline.experts.values())
    with recorded(networks, probe, engine=True) as engine_calls, recorded_steps(pipeline) as engine_steps:
        (trajectory,) = engine.generate([request])
    velocities: list[torch.Tensor] = []
    compute = base.velocity

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        velocities.append(compute(*args, **kwargs))
        return velocities[-1]

    own = list(experts(policy).values())
    with recorded(own, probe, engine=False) as trainer_calls, swapped(base, "velocity", recording):
        (log_probs,) = recompute(policy, [trajectory], family=family, dtype=dtype, micro_batch_size=1)
    return Trace(trajectory, log_probs, engine_calls, engine_steps, trainer_calls, velocities)


def differing_weights(engine: RolloutEngine, policy: nn.Module, dtype: torch.dtype) -> list[str]:
    """Names of the tensors that the two sides do not hold alike."""
    held: Mapping[str, str] = engine.policy_digests()
    own = {name: tensor_digest(tensor) for name, tensor in effective_weights(policy, dtype)}
    return [name for name in sorted(held.keys() | own.keys()) if held.get(name) != own.get(name)]


def _kept(value: Any) -> Any:
    return value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def pairs(found: Trace) -> Iterator[tuple[int, int, Sequence[Call], Sequence[Call]]]:
    """(position, step index, the engine's calls, the trainer's calls) of each stochastic step."""
    trajectory = found.trajectory
    told = conditioning(trajectory, torch.device("cpu"))
    passes = [told.passes(expert_at(trajectory.spec, step)) for step in range(len(trajectory.sigmas) - 1)]
    taken = 0
    for position, step in enumerate(trajectory.step_indices.tolist()):
        mine, first = slice(taken, taken + passes[step]), sum(passes[:step])
        taken += passes[step]
        yield position, step, found.engine_calls[first : first + passes[step]], found.trainer_calls[mine]
