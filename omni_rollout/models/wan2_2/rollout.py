"""Wan2.2 inside vllm-omni's engine: text, noise, networks and decoding; the loop is `base/rollout.py`."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.conv import Conv3dLayer

from omni_rollout.diffusion import exact_ops
from omni_rollout.diffusion.activations import exact_gelu, install_activations
from omni_rollout.models import family_module
from omni_rollout.models.base.encodings import both_branches
from omni_rollout.models.base.rollout import WARM_UP_WIDTH, RolloutMixin, to_uint8
from omni_rollout.models.base.velocity import Conditioning
from omni_rollout.models.wan2_2.checkpoint import boundary_misfit, read_index
from omni_rollout.models.wan2_2.operators import PatchProduct
from omni_rollout.models.wan2_2.without_torchvision import without_torchvision
from omni_rollout.types import Prompt, RequestError, SamplingSpec

with without_torchvision():
    from vllm_omni.diffusion.models.wan2_2 import Wan22Pipeline
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import ColumnParallelGELU


class ExactColumnGELU(ColumnParallelGELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return exact_gelu(self.proj(x))


class ExactConv3d(PatchProduct, Conv3dLayer):
    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class WanTransformers:
    """How every pipeline of Wan2.2's transformers installs and calls them. A base between `RolloutMixin` and the stock one."""

    family: ClassVar[str]
    experts: Any
    tokenizer: Any
    text_encoder: Any
    vae: Any
    encode_prompt: Any
    device: Any
    dtype: torch.dtype
    parity: str
    index: dict[str, Any]

    def install(self, model: str) -> None:
        self.index = read_index(model, family_module(self.family, "spec").IN_CHANNELS)
        if self.parity == "reference":
            policy = family_module(self.family, "policy").load_policy(model, self.dtype, self.parity)
            for name, network in policy.requires_grad_(False).named_children():
                for parameter in network.parameters():  # not its buffers: RoPE's tables are fp32
                    parameter.data = parameter.data.to(self.dtype)
                setattr(self, name, network)
        if self.parity == "exact":
            for network in self.experts.values():
                install(network, self.dtype)

    def call(self, *, expert: int, encoder_hidden_states_mask: None = None, **inputs: Any) -> torch.Tensor:
        assert encoder_hidden_states_mask is None
        return list(self.experts.values())[expert](**inputs, return_dict=False)[0]

    def warm_up(self, height: int, width: int) -> tuple[Prompt, SamplingSpec]:
        return Prompt(text="dummy run"), family_module(self.family, "spec").resolve(self.warm_up_values(height, width))

    def warm_up_values(self, height: int, width: int) -> dict[str, Any]:
        size = {"height": height, "width": width, "true_cfg_scale": 1.0, "sde_type": "ode", "prompt_width": WARM_UP_WIDTH}
        return {**size, "extra": {"frames": 1, "boundary_ratio": self.index.get("boundary_ratio")}}

    def encode(self, prompt: Prompt, spec: SamplingSpec) -> Conditioning:
        problem = boundary_misfit(self.index, spec.extra["boundary_ratio"])
        if problem is not None:
            raise RequestError(problem)
        return both_branches(prompt, spec, partial(self._encode, spec))

    def _encode(self, spec: SamplingSpec, text: str, width: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, D] with zeros after the text, and a mask that says what the transformer does: it attends to all of them."""
        tokens = family_module(self.family, "spec").text_tokens(self.tokenizer, text, spec)
        if tokens > width:  # the stock function would cut the rest off
            raise RequestError(f"{what} has {tokens} text tokens, the fixed width is {width}; shorten it or raise the width")
        embeds, _ = self.encode_prompt(
            prompt=text, do_classifier_free_guidance=False, max_sequence_length=width, dtype=self.dtype
        )
        return embeds[0], torch.ones(width, dtype=torch.bool, device=embeds.device)

    def noise(self, spec: SamplingSpec, generator: torch.Generator) -> torch.Tensor:
        shape = (1, *family_module(self.family, "spec").layout(spec).latent)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(self.device)

    def decode(self, latents: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
        config = self.vae.config
        mean, std = (
            torch.tensor(numbers, device=latents.device)[:, None, None, None]
            for numbers in (config.latents_mean, config.latents_std)
        )
        video = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return to_uint8(video).permute(0, 2, 3, 4, 1)


def install(network: nn.Module, dtype: torch.dtype) -> None:
    """Lets the engine's transformer multiply in calls of constant shape; vLLM's own layers do (rollout/platform/linear.py)."""
    exact_ops.install_linears(network, dtype)
    install_activations(network)
    for layer in network.modules():
        if type(layer) is ColumnParallelGELU:
            layer.__class__ = ExactColumnGELU
        elif isinstance(layer, Conv3dLayer):
            layer.__class__ = ExactConv3d
            patches: Any = layer
            patches.compute_dtype = dtype


class WanRolloutPipeline(WanTransformers, RolloutMixin, Wan22Pipeline):
    family: ClassVar[str] = "wan2_2"
