"""The denoising loop inside vllm-omni's engine, step by step, recording what RL needs: once, for every family.

The engine calls prepare_encode once per request, denoise_step once per step for all requests in flight, step_scheduler
per request and step, post_decode at the end. Its `InputBatch` trims prompt embeddings to the longest valid prompt in
flight and refuses mixed guidance, so it is given none of that: the authoritative tensors live in `state.extra`, and
denoise_step builds its own batches from them.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest

from omni_rollout.diffusion.machine import machine, pin_thread
from omni_rollout.diffusion.one_thread import FasterThreads
from omni_rollout.diffusion.schedule import WARM_UP, Schedule
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.models import family_module
from omni_rollout.models.base.channel_norms import install_channel_norms
from omni_rollout.models.base.encodings import Encodings
from omni_rollout.models.base.images import open_image
from omni_rollout.models.base.sampling import check_text
from omni_rollout.models.base.velocity import Conditioning, expert_at, velocity
from omni_rollout.types import InputImage, Prompt, SamplingSpec

WARM_UP_WIDTH = 64


@dataclass
class Denoising:
    """One request's way through the engine; lives in `state.extra["denoising"]`."""

    spec: SamplingSpec
    schedule: Schedule
    conditioning: Conditioning
    initial_noise: torch.Tensor | None  # [1, *shape] fp32; None: what it ends with is given, and no step is taken
    latents: list[torch.Tensor] = field(default_factory=list)  # T+1 of [1, *shape] fp32
    log_probs: list[torch.Tensor] = field(default_factory=list)  # T of [1] fp32
    batch_sizes: list[int] = field(default_factory=list)  # requests in the same forward pass, per step


class RolloutMixin:
    """First base of a family's pipeline, before vllm-omni's own class.

    A family gives `family`, `encode`, `noise`, `decode`, `call` and, where its operators must be changed, `install`.
    """

    family: ClassVar[str]
    supports_step_execution: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = False
    support_image_input: ClassVar[bool] = False  # so the engine's warm-up sends no picture
    scheduler: Any
    vae: Any
    device: Any

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)  # type: ignore[call-arg]
        self._interrupt = False
        self.dtype = od_config.dtype
        self.policy_version = 0
        arguments: Any = od_config.custom_pipeline_args
        self.encodings = Encodings(2 * od_config.max_num_seqs)
        self.steps = 0  # that were taken, of all requests: what a command shows as it waits
        self.parity: str = arguments["parity"]
        self.threads: int = arguments["threads"]
        self.faster_threads = FasterThreads()
        if self.parity != "reference":
            install_channel_norms(self.vae)
        self.install(str(od_config.model))

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def experts(self) -> dict[str, nn.Module]:
        """Folder in the checkpoint -> network, in the order of the family's `EXPERTS`."""
        return {name: getattr(self, name) for name in family_module(self.family, "spec").EXPERTS}

    def install(self, model: str) -> None:
        """Replaces operators, or with parity=reference the network; the checkpoint is at `model`."""

    def encode(self, prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        """Text, and with input images the vision tower and the VAE."""
        raise NotImplementedError

    def encoded(self, prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        """`encode`, once for a group: text is kept by the engine's own cache, images by ours. All that are in flight wait."""
        if not prompt.images:
            return self.encode(prompt, spec)
        return self.encodings.take(prompt, spec, self.encode)

    def noise(self, spec: SamplingSpec, generator: torch.Generator) -> torch.Tensor:
        """[1, *shape] fp32."""
        raise NotImplementedError

    def encode_target(self, image: Image.Image, spec: SamplingSpec) -> torch.Tensor:
        """[1, *shape] fp32: the final latents that decode to this RGB picture of the spec's size: the mean, without noise."""
        raise NotImplementedError

    def decode(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        """[B, *shape] fp32 of one size -> uint8 [B, *media], of the shape of `Layout.media`."""
        raise NotImplementedError

    def decode_beside_the_loop(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        """`decode`, while other threads encode or decode.

        These VAEs keep what they remember of earlier frames in themselves; so each call has one of its own, of the same layers.
        """
        own, vae = copy(self), copy(self.vae)
        vae.__dict__.pop("decode", None)  # vllm-omni's wrapper, for pipelines of several stages, decodes with the other
        own._modules = {**self._modules, "vae": vae}  # pyright: ignore[reportAttributeAccessIssue]
        with torch.cuda.device(self.device) if torch.device(self.device).type == "cuda" else nullcontext():
            return type(self).decode(own, latents, spec)  # what an instrument put in its place on `self` is bound to `self`

    def call(self, *, expert: int, **inputs: Any) -> torch.Tensor:
        """The engine's network on what `velocity` gives it."""
        raise NotImplementedError

    def warm_up(self, height: int, width: int) -> tuple[Prompt, SamplingSpec]:
        """What the engine samples once as it starts, one step; a family with input images makes blank ones."""
        size = {"height": height, "width": width, "true_cfg_scale": 1.0, "sde_type": "ode", "prompt_width": WARM_UP_WIDTH}
        return Prompt(text="dummy run"), family_module(self.family, "spec").resolve(size)

    def prepare_encode(self, state: Any, **_: Any) -> Any:
        pin_thread(self.threads)  # this is the engine's own thread
        prompt, spec, schedule, target = self._resolve(state)
        check_text(prompt.text, family_module(self.family, "spec").RULES)
        conditioning = self.encoded(prompt, spec)
        state.latents = self.noise(spec, state.sampling.generator) if target is None else self._encoded_target(target, spec)
        state.timesteps = schedule.timesteps
        state.step_index = 0 if target is None else len(schedule.timesteps) - 1  # the engine knows no request without a step
        state.do_true_cfg = False  # for the engine; guidance is ours, per request
        state.extra["denoising"] = Denoising(
            spec=spec,
            schedule=schedule,
            conditioning=conditioning,
            initial_noise=state.latents.clone() if target is None else None,
        )
        return state

    def _encoded_target(self, target: InputImage, spec: SamplingSpec) -> torch.Tensor:
        """One at a time, so that the bits do not depend on what else is asked for."""
        return self.encode_target(open_image(target), spec)

    def _resolve(self, state: Any) -> tuple[Prompt, SamplingSpec, Schedule, InputImage | None]:
        if OmniDiffusionRequest.is_dummy_run_request_id(state.request_id):
            return *self.warm_up(state.sampling.height, state.sampling.width), WARM_UP, None
        asked = state.sampling.extra_args
        spec = SamplingSpec.from_json(asked["spec"])
        schedule = family_module(spec.family, "spec").schedule(spec, self.scheduler.config)
        prompt, target = Prompt.from_json(asked["prompt"]), asked["target"]
        return prompt, spec, schedule, None if target is None else prompt.targets[target]

    def denoise_step(self, input_batch: Any, *, states: Any = None, **_: Any) -> torch.Tensor:
        pin_thread(self.threads)
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for position, state in enumerate(states):
            if state.extra["denoising"].initial_noise is not None:
                groups[state.extra["denoising"].conditioning.batch_key(state.step_index)].append(position)
        rows: list[torch.Tensor] = [state.latents for state in states]  # of given ones nobody asks for a velocity
        for key, positions in groups.items():
            members = [states[position] for position in positions]
            latents = torch.cat([state.latents for state in members])
            with self.faster_threads.taken((key, latents.shape)):
                result = velocity(
                    self.call,
                    latents,
                    torch.stack([state.timesteps[state.step_index] for state in members]).to(self.device),
                    [state.extra["denoising"].conditioning for state in members],
                    self.dtype,
                    expert=expert_at(members[0].extra["denoising"].spec, members[0].step_index),
                )
            for row, position in enumerate(positions):
                rows[position] = result[row : row + 1]
                states[position].extra["denoising"].batch_sizes.append(len(members))
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"latents of shapes {[list(row.shape) for row in rows]} in one batch of the engine")
        return torch.cat(rows)

    def step_scheduler(self, state: Any, noise_pred: torch.Tensor, **_: Any) -> None:
        run: Denoising = state.extra["denoising"]
        index = state.step_index
        if run.initial_noise is None:
            state.step_index += 1
            return
        stochastic = index in run.spec.step_indices
        step = sde_step(
            noise_pred,
            state.latents,
            run.schedule.sigmas[index],
            run.schedule.sigmas[index + 1],
            noise_level=run.spec.noise_level,
            sde_type=run.spec.sde_type if stochastic else "ode",
            generator=state.sampling.generator,
            log_prob_form=run.spec.log_prob_form,
        )
        if stochastic:
            if not run.latents:
                run.latents.append(state.latents.clone())
            run.latents.append(step.prev_sample)
            run.log_probs.append(step.log_prob)
        state.latents = step.prev_sample.clone()  # the runner writes into state.latents in place
        state.step_index += 1
        self.steps += 1

    def post_decode(self, state: Any, **_: Any) -> DiffusionOutput:
        run: Denoising = state.extra["denoising"]
        condition = run.conditioning
        record = {
            "latents": torch.cat(run.latents or [state.latents]),
            "log_probs": torch.cat(run.log_probs) if run.log_probs else torch.empty(0),
            "sigmas": run.schedule.sigmas,
            "timesteps": run.schedule.timesteps,
            "prompt_embeds": condition.prompt_embeds,
            "prompt_embeds_mask": condition.prompt_embeds_mask,
            "negative_prompt_embeds": condition.negative_prompt_embeds,
            "negative_prompt_embeds_mask": condition.negative_prompt_embeds_mask,
            "conditions": dict(condition.conditions),
            "policy_version": self.policy_version,
            "machine": machine(self.device),
            "batch_sizes": run.batch_sizes,
            "initial_noise": run.initial_noise,
            "final_latents": state.latents,
        }
        # No image yet: a batch of them is decoded outside of the step loop, see `rollout/decoding.py`.
        return DiffusionOutput(output={"payload": {"image": state.latents}, "metadata": {"rollout": record}}, to_cpu=True)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] of any shape -> 0 to 255."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
