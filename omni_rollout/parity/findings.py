"""What a trace says, in words: where the two sides part, and which rule that breaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_rollout.diffusion.schedule import Schedule
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.models import family_module
from omni_rollout.parity.trace import Call, Trace, pairs, same
from omni_rollout.trajectories.digest import combined_digest, tensor_digest
from omni_rollout.types import Trajectory


@dataclass(frozen=True)
class Finding:
    where: str  # weights, schedule, expert, input, module, guidance, latents, step, seed, encoding, engine
    name: str  # of the tensor, input or module
    what: str


def from_weights(names: Sequence[str]) -> list[Finding]:
    """At most three names in words; the rest as a number."""
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        Finding("weights", names[0], f"differ in {len(names)} tensors: {', '.join(names[:3])}{more}; was an update missed?")
    ]


def from_seeds(trajectories: Sequence[Trajectory]) -> list[Finding]:
    """Images that should have noise of their own but share it; log-probs are a function of the noise."""
    seen: dict[bytes, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        seen[trajectory.latents[0].numpy().tobytes()].append(trajectory)
    shared = [found for found in seen.values() if len({trajectory.seed for trajectory in found}) > 1]
    return [
        Finding("seed", found[0].request_id, f"starts from the same noise as {', '.join(t.request_id for t in found[1:])}")
        for found in shared
    ]


def from_encodings(trajectories: Sequence[Trajectory]) -> list[Finding]:
    """Texts or images encoded to what others were: records hold what was used, so that no recomputation can tell."""
    found: list[Finding] = []
    texts: dict[str, Trajectory] = {}
    images: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        first = texts.setdefault(tensor_digest(trajectory.prompt_embeds), trajectory)
        if first.prompt.text != trajectory.prompt.text:
            found.append(_shared("prompt_embeds", "text", trajectory, first))
        if not trajectory.conditions:
            continue
        digest = combined_digest({name: tensor_digest(tensor) for name, tensor in trajectory.conditions.items()})
        first = images.setdefault(digest, trajectory)
        if [image.sha256 for image in first.prompt.images] != [image.sha256 for image in trajectory.prompt.images]:
            found.append(_shared("conditions", "input images", trajectory, first))
    return found


def _shared(name: str, what: str, trajectory: Trajectory, first: Trajectory) -> Finding:
    return Finding("encoding", trajectory.request_id, f"its {name} are those of {first.request_id}, which has other {what}")


def from_trace(found: Trace, schedule: Schedule) -> Finding | None:
    """The first difference, or None."""
    trajectory = found.trajectory
    meanings = family_module(trajectory.spec.family, "probe").MEANING
    experts = family_module(trajectory.spec.family, "spec").EXPERTS
    for name in ("sigmas", "timesteps"):
        if not torch.equal(getattr(trajectory, name), getattr(schedule, name)):
            return Finding("schedule", name, f"the rollout's {name} are not those of the trainer's schedule")
    expected = len(trajectory.sigmas) - 1
    if len(found.engine_steps) != expected:
        return Finding("step", "number of steps", f"the engine took {len(found.engine_steps)}, the schedule has {expected}")
    for position, step, engine_calls, trainer_calls in pairs(found):
        if len(engine_calls) != len(trainer_calls):
            return Finding("guidance", f"step {step}", f"{len(engine_calls)} engine calls, {len(trainer_calls)} trainer calls")
        calls = list(zip(engine_calls, trainer_calls, strict=True))
        difference = (
            _in_record(found, position, step)
            or next(filter(None, (_in_expert(a, b, step, experts) for a, b in calls)), None)
            or next(filter(None, (_in_inputs(a, b, step, meanings) for a, b in calls)), None)
            or next(filter(None, (_in_modules(a, b, step) for a, b in calls)), None)
            or _in_guidance(found, position, step)
            or _in_step(found, position, step)
        )
        if difference is not None:
            return difference
    return None


def _in_record(found: Trace, position: int, step: int) -> Finding | None:
    """Whether the trajectory holds the latents that the engine had."""
    stored = found.trajectory.latents
    for name, at, own in (
        ("before", position, found.engine_steps[step].before),
        ("after", position + 1, found.engine_steps[step].after),
    ):
        if torch.equal(stored[at], own[0]):
            continue
        where = f"{name} step {step}"
        if torch.equal(stored[at], own[0].bfloat16().float()):
            return Finding("latents", where, "the record holds them rounded to bfloat16; they must stay fp32")
        for other, candidate in enumerate(found.engine_steps):
            if torch.equal(stored[at], getattr(candidate, name)[0]):
                return Finding("latents", where, f"the record holds those {name} step {other}: its window is shifted")
        return Finding("latents", where, f"the record differs by up to {_gap(stored[at], own[0]):.3g} from what the engine had")
    return None


def _in_expert(engine: Call, trainer: Call, step: int, experts: Sequence[str]) -> Finding | None:
    if engine.expert == trainer.expert:
        return None
    detail = f"{experts[engine.expert]} in the engine, {experts[trainer.expert]} in the trainer"
    return Finding("expert", f"step {step}", f"the boundary between the experts lies elsewhere: {detail}")


def _in_inputs(engine: Call, trainer: Call, step: int, meanings: Mapping[str, str]) -> Finding | None:
    for name, meaning in meanings.items():
        if not same(engine.inputs.get(name), trainer.inputs.get(name)):
            detail = f"{_told(engine.inputs.get(name))} in the engine, {_told(trainer.inputs.get(name))} in the trainer"
            return Finding("input", name, f"step {step}: {meaning} ({detail})")
    lengths = engine.inputs.get("txt_seq_lens")
    width = engine.inputs["encoder_hidden_states"].shape[1]
    if lengths is not None and set(lengths) != {width}:
        return Finding("input", "txt_seq_lens", f"step {step}: RoPE lengths {list(lengths)}, the text is {width} wide")
    return None


def _in_modules(engine: Call, trainer: Call, step: int) -> Finding | None:
    for name, value in trainer.outputs.items():
        other = engine.outputs.get(name)
        if other is None or other.numel() != value.numel():
            continue
        if not same(other.reshape(value.shape), value):
            gap = _gap(other.reshape(value.shape), value)
            return Finding("module", name, f"step {step}: first module whose output differs, by up to {gap:.3g}")
    return None


def _in_guidance(found: Trace, position: int, step: int) -> Finding | None:
    engine, trainer = found.engine_steps[step].velocity, found.trainer_velocities[position].cpu()
    if same(engine, trainer):
        return None
    return Finding(
        "guidance",
        f"step {step}",
        f"equal transformer outputs were combined differently: {engine.dtype} in the engine, differs by up to "
        f"{_gap(engine, trainer):.3g}",
    )


def _in_step(found: Trace, position: int, step: int) -> Finding | None:
    trajectory = found.trajectory
    rollout, trainer = trajectory.log_probs[position], found.log_probs[position]
    if same(rollout, trainer):
        return None
    for other in range(len(trajectory.sigmas) - 2):
        score = _scored_as(found, position, other)
        if other != step and abs(score - float(rollout)) < 1e-5:
            return Finding("step", f"step {step}", f"the engine stepped between the sigmas of step {other}")
    return Finding(
        "step",
        f"step {step}",
        f"equal velocities, but log-probs of {rollout.item():.7g} in the engine and {trainer.item():.7g}",
    )


def _scored_as(found: Trace, position: int, step: int) -> float:
    trajectory = found.trajectory
    return sde_step(
        found.trainer_velocities[position].cpu(),
        trajectory.latents[position : position + 1],
        trajectory.sigmas[step],
        trajectory.sigmas[step + 1],
        noise_level=trajectory.spec.noise_level,
        sde_type=trajectory.spec.sde_type,
        prev_sample=trajectory.latents[position + 1 : position + 2],
        log_prob_form=trajectory.spec.log_prob_form,
    ).log_prob.item()


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left.double() - right.double()).abs().max().item()


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, first {value.flatten()[0].item():.7g}"
    return str(value)
