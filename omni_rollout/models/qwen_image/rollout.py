"""Qwen-Image inside vllm-omni's engine, step by step, recording what RL needs.

The engine calls prepare_encode once per request, denoise_step once per step for all requests in flight, step_scheduler
per request and step, post_decode at the end. Its `InputBatch` trims prompt embeddings to the longest valid prompt in
flight and refuses mixed guidance, so it is given none of that: the authoritative tensors live in `state.extra`, and
denoise_step builds its own batches from them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.qwen_image import QwenImagePipeline
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import ColumnParallelApproxGELU
from vllm_omni.diffusion.request import OmniDiffusionRequest

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import exact_gelu, install_activations
from omni_rollout.diffusion.machine import machine, pin_thread
from omni_rollout.diffusion.schedule import Schedule, build_schedule
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.models.qwen_image.policy import load_policy, network
from omni_rollout.models.qwen_image.spec import image_tokens, resolve
from omni_rollout.models.qwen_image.velocity import Conditioning, pad_to_width, velocity
from omni_rollout.trajectories.digest import tensor_digest
from omni_rollout.types import SamplingSpec

WARM_UP_WIDTH = 64


@dataclass
class Denoising:
    """One request's way through the engine; lives in `state.extra["denoising"]`."""

    spec: SamplingSpec
    schedule: Schedule
    conditioning: Conditioning
    initial_noise: str  # digest
    latents: list[torch.Tensor] = field(default_factory=list)  # T+1 of [1, S, C] fp32
    log_probs: list[torch.Tensor] = field(default_factory=list)  # T of [1] fp32
    batch_sizes: list[int] = field(default_factory=list)  # requests in the same forward pass, per step


class ExactApproxGELU(ColumnParallelApproxGELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return exact_gelu(self.proj(x))


class QwenImageRolloutPipeline(QwenImagePipeline):
    supports_request_batch: ClassVar[bool] = False

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self._interrupt = False
        self.dtype = od_config.dtype
        self.policy_version = 0
        self.steps = 0  # that were taken, of all requests: what a command shows as it waits
        arguments: Any = od_config.custom_pipeline_args
        parity, self.threads = arguments["parity"], arguments["threads"]
        self.reference = parity == "reference"
        if parity == "exact":
            exact_ops.install_linears(self.transformer, self.dtype)  # vLLM's own have theirs: rollout/platform/linear.py
            install_activations(self.transformer)
            for layer in self.transformer.modules():
                if type(layer) is ColumnParallelApproxGELU:
                    layer.__class__ = ExactApproxGELU
        if self.reference:
            in_channels = self.transformer.in_channels
            reference: Any = load_policy(str(od_config.model), self.dtype, parity)
            self.transformer = reference.to(self.dtype).requires_grad_(False)
            self.transformer.in_channels = in_channels

    def prepare_encode(self, state: Any, **_: Any) -> Any:
        spec, schedule = self._resolve(state)
        embeds, mask = self._encode(state.prompt["prompt"], spec.prompt_width, "prompt")
        negative_embeds, negative_mask = None, None
        if spec.negative_prompt is not None:
            negative_embeds, negative_mask = self._encode(spec.negative_prompt, spec.negative_prompt_width, "negative prompt")
        state.latents = self.prepare_latents(
            1, self.transformer.in_channels // 4, spec.height, spec.width, torch.float32, self.device, state.sampling.generator
        )
        state.timesteps = schedule.timesteps
        state.step_index = 0
        state.do_true_cfg = False  # for the engine; guidance is ours, per request
        state.extra["denoising"] = Denoising(
            spec=spec,
            schedule=schedule,
            conditioning=Conditioning(
                prompt_embeds=embeds,
                prompt_embeds_mask=mask,
                negative_prompt_embeds=negative_embeds,
                negative_prompt_embeds_mask=negative_mask,
                true_cfg_scale=spec.true_cfg_scale,
                height=spec.height,
                width=spec.width,
            ),
            initial_noise=tensor_digest(state.latents)[:16],
        )
        return state

    def _resolve(self, state: Any) -> tuple[SamplingSpec, Schedule]:
        if OmniDiffusionRequest.is_dummy_run_request_id(state.request_id):  # the engine's warm-up: one step, "dummy run"
            size = {"height": state.sampling.height, "width": state.sampling.width}
            spec = resolve({**size, "true_cfg_scale": 1.0, "sde_type": "ode", "prompt_width": WARM_UP_WIDTH})
            return spec, Schedule(sigmas=torch.tensor([1.0, 0.0]), timesteps=torch.tensor([1000.0]))
        spec = SamplingSpec.from_json(state.sampling.extra_args["spec"])
        scheduler: Any = self.scheduler
        return spec, build_schedule(scheduler, spec.num_inference_steps, image_tokens(spec.height, spec.width))

    def _encode(self, text: str, width: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask = self.encode_prompt(prompt=text, max_sequence_length=self.tokenizer_max_length)
        return pad_to_width(embeds[0].to(self.dtype), mask[0], width, what)

    def denoise_step(self, input_batch: Any, *, states: Any = None, **_: Any) -> torch.Tensor:
        pin_thread(self.threads)  # this is the engine's own thread
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for position, state in enumerate(states):
            groups[state.extra["denoising"].conditioning.batch_key].append(position)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(states)
        for positions in groups.values():
            members = [states[position] for position in positions]
            conditions = [state.extra["denoising"].conditioning for state in members]
            result = velocity(
                self._network,
                torch.cat([state.latents for state in members]),
                torch.stack([state.timesteps[state.step_index] for state in members]).to(self.device),
                conditions,
                self.dtype,
            )
            for row, position in enumerate(positions):
                rows[position] = result[row : row + 1]
                states[position].extra["denoising"].batch_sizes.append(len(members))
        return torch.cat(rows)

    def _network(self, *, encoder_hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if self.reference:
            return network(self.transformer, encoder_hidden_states=encoder_hidden_states, **inputs)
        # RoPE's length is the width the transformer sees, never the number of valid tokens.
        widths = [encoder_hidden_states.shape[1]] * encoder_hidden_states.shape[0]
        return self.transformer(
            encoder_hidden_states=encoder_hidden_states, txt_seq_lens=widths, guidance=None, attention_kwargs={}, **inputs
        )[0]

    def step_scheduler(self, state: Any, noise_pred: torch.Tensor, **_: Any) -> None:
        run: Denoising = state.extra["denoising"]
        index = state.step_index
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
        decoded = self._decode_latents(state.latents, run.spec.height, run.spec.width, output_type="pt").output
        assert isinstance(decoded, torch.Tensor)
        image = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        sigmas, condition = run.schedule.sigmas, run.conditioning
        record = {
            "latents": torch.cat(run.latents) if run.latents else state.latents[:0],
            "log_probs": torch.cat(run.log_probs) if run.log_probs else torch.empty(0),
            "sigmas": sigmas,
            "timesteps": run.schedule.timesteps,
            "prompt_embeds": condition.prompt_embeds,
            "prompt_embeds_mask": condition.prompt_embeds_mask,
            "negative_prompt_embeds": condition.negative_prompt_embeds,
            "negative_prompt_embeds_mask": condition.negative_prompt_embeds_mask,
            "policy_version": self.policy_version,
            "machine": machine(self.device),
            "batch_sizes": run.batch_sizes,
            "initial_noise": run.initial_noise,
        }
        return DiffusionOutput(output={"payload": {"image": image}, "metadata": {"rollout": record}}, to_cpu=True)
