"""Training the nano Wan2.2's two experts by flow matching on cached latents of rendered videos, each at its own times."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import nn

from omni_rollout.models.wan2_2.spec import EXPERTS, IN_CHANNELS, LATENT_CHANNELS, RULES
from omni_rollout.nano.transformer import TrainingSettings, flow_matching
from omni_rollout.nano.vae import latent_scale
from omni_rollout.nano.wan.scenes import Scene, sample_scenes
from omni_rollout.nano.wan.vae import encode

PROMPT_WIDTH = 16
"""Fixed width in tokens of the recipe's prompts; the zeros after a text are attended to."""
BOUNDARY = float(RULES.extra["boundary_ratio"].default)
"""The sigma below which the second expert computes."""
FREQUENCIES = 64
"""Of the sinusoid of time."""


@dataclass(frozen=True)
class WanSettings(TrainingSettings):
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    joint_dim: int = 64
    scenes: int = 1500
    batch: int = 32
    """Of each expert."""
    max_steps: int = 900
    cosine_steps: int = 4600
    evaluate_from: int = 300
    evaluate_every: int = 150


class Experts(nn.ModuleDict):
    def save_pretrained(self, folder: Path) -> None:
        for name, expert in self.items():
            saved: Any = expert
            saved.save_pretrained(folder / name)


@dataclass(frozen=True)
class Videos:
    latents: torch.Tensor
    """float32 [scenes, 16, 2, 6, 8]: normalised posterior means."""
    prompt_embeds: torch.Tensor
    """float32 [scenes, PROMPT_WIDTH, joint_dim], with zeros after the text."""


def make_experts(settings: WanSettings, seed: int) -> Experts:
    width = settings.heads * settings.head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Experts(
            {
                name: WanTransformer3DModel(
                    num_attention_heads=settings.heads,
                    attention_head_dim=settings.head_dim,
                    in_channels=IN_CHANNELS,
                    out_channels=LATENT_CHANNELS,
                    text_dim=settings.joint_dim,
                    freq_dim=FREQUENCIES,
                    ffn_dim=27 * width // 10,  # as published, 13824 of 5120
                    num_layers=settings.layers,
                )
                for name in EXPERTS
            }
        )


@torch.no_grad()
def encode_scenes(pipeline: WanPipeline, made: Sequence[Scene]) -> Videos:
    """By the pipeline's VAE, and by its own embeddings of each prompt.

    Raises ValueError if a prompt is longer than `PROMPT_WIDTH` tokens.
    """
    prompts = sorted({scene.prompt for scene in made})
    longest = max(len(pipeline.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    if longest > PROMPT_WIDTH:
        raise ValueError(f"the longest of {len(prompts)} prompts takes {longest} tokens, more than {PROMPT_WIDTH}")
    embeds, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=PROMPT_WIDTH, device=torch.device("cpu")
    )
    mean, std = latent_scale(pipeline.vae)
    rows = torch.tensor([prompts.index(scene.prompt) for scene in made])
    return Videos((encode(pipeline.vae, list(made)) - mean) / std, embeds[rows])


def make_dataset(pipeline: WanPipeline, count: int, seed: int) -> Videos:
    return encode_scenes(pipeline, sample_scenes(count, seed))


def velocity(expert: WanTransformer3DModel, latents: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """As `latents` [B, 16, 2, 6, 8] at `sigma` [B], told of `embeds` [B, PROMPT_WIDTH, joint_dim]."""
    answer = expert(hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=embeds, return_dict=False)
    return answer[0].float()


def videos_loss(experts: Experts, data: Videos, settings: WanSettings, generator: torch.Generator) -> torch.Tensor:
    """Sum over the experts, each on a random batch and at times of its own."""
    losses = []
    for place, name in enumerate(EXPERTS):
        rows = torch.randint(len(data.latents), (settings.batch,), generator=generator)
        network: Any = experts[name]
        told = partial(velocity, network, embeds=data.prompt_embeds[rows])
        losses.append(flow_matching(told, data.latents[rows], generator, partial(_sigma, place)))
    return torch.stack(losses).sum()


def _sigma(expert: int, drawn: torch.Tensor) -> torch.Tensor:
    """Uniform above the boundary for the first; below, the boundary times sigmoid(N(0.5, 1))."""
    if expert == 0:
        return BOUNDARY + (1 - BOUNDARY) * torch.special.ndtr(drawn)
    return BOUNDARY * torch.sigmoid(0.5 + drawn)
