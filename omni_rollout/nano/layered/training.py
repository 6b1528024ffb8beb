"""Training the nano Qwen-Image-Layered's transformer by flow matching on cached latents of rendered layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from omni_rollout.nano import render
from omni_rollout.nano.components import LATENT_CHANNELS, PATCH_SIZE, make_transformer
from omni_rollout.nano.layered.pictures import LAYERS, sample_signs
from omni_rollout.nano.layered.vae import encode
from omni_rollout.nano.tokenizer import PROMPT_WIDTH
from omni_rollout.nano.transformer import GRID, TrainingSettings, embed_prompts, flow_matching
from omni_rollout.nano.vae import latent_scale

FRAMES = LAYERS + 1
"""That are denoised: the whole picture, then the layers."""
TOKENS = GRID * GRID
"""Of one frame."""


@dataclass(frozen=True)
class LayeredSettings(TrainingSettings):
    signs: int = 8_000
    batch: int = 24
    max_steps: int = 3000
    cosine_steps: int = 3300
    learning_rate: float = 7e-4
    evaluate_from: int = 200
    evaluate_every: int = 100


@dataclass(frozen=True)
class Layered:
    """Some signs, as the transformer sees them."""

    latents: torch.Tensor
    """float32 [signs, FRAMES * TOKENS, 64]: packed, normalised posterior means; the first frame is the input image as well."""
    prompt_embeds: torch.Tensor
    """float32 [signs, PROMPT_WIDTH, joint_dim]."""
    prompt_embeds_mask: torch.Tensor
    """bool [signs, PROMPT_WIDTH]: True where a token is."""

    @property
    def image_latents(self) -> torch.Tensor:
        """float32 [signs, TOKENS, 64]."""
        return self.latents[:, :TOKENS]


def grown(transformer: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """nano's weights in a transformer that counts layers and is told whether pictures have alpha, which changes nothing yet."""
    config = transformer.config
    wider = make_transformer(
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        joint_dim=config["joint_attention_dim"],
        use_layer3d_rope=True,
        use_additional_t_cond=True,
    )
    of_alpha = "time_text_embed.addition_t_embedding.weight"
    wider.load_state_dict({**transformer.state_dict(), of_alpha: torch.zeros_like(wider.state_dict()[of_alpha])})
    return wider


@torch.no_grad()
def encode_signs(pipeline: QwenImagePipeline, vae: AutoencoderKLQwenImage, signs: Sequence[render.Sign]) -> Layered:
    """`pipeline`: whose text encoder and tokenizer are taken, Qwen-Image's; `vae`: of pictures with alpha."""
    mean, std = latent_scale(vae)
    latents = (encode(vae, list(signs)) - mean) / std
    side = GRID * PATCH_SIZE
    packed = QwenImagePipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, side, side)
    prompts = [render.prompt_for(sign.text, sign.color) for sign in signs]
    row = {prompt: index for index, prompt in enumerate(sorted(set(prompts)))}
    embeds, mask = embed_prompts(pipeline, list(row), PROMPT_WIDTH)
    rows = torch.tensor([row[prompt] for prompt in prompts])
    return Layered(packed.reshape(len(signs), FRAMES * TOKENS, -1), embeds[rows], mask[rows])


def make_dataset(pipeline: QwenImagePipeline, vae: AutoencoderKLQwenImage, count: int, seed: int) -> Layered:
    return encode_signs(pipeline, vae, sample_signs(count, seed))


def velocity(
    transformer: QwenImageTransformer2DModel, latents: torch.Tensor, sigma: torch.Tensor, told: Layered, rows: torch.Tensor
) -> torch.Tensor:
    """[B, FRAMES * TOKENS, 64] of `latents` at `sigma` [B], told of these `rows` [B]."""
    prediction = transformer(
        hidden_states=torch.cat([latents, told.image_latents[rows]], dim=1),
        encoder_hidden_states=told.prompt_embeds[rows],
        encoder_hidden_states_mask=told.prompt_embeds_mask[rows],
        timestep=sigma,
        img_shapes=[[(1, GRID, GRID)] * (FRAMES + 1)] * len(rows),
        additional_t_cond=torch.zeros(len(rows), dtype=torch.long),
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]].float()


def layered_loss(
    transformer: QwenImageTransformer2DModel, data: Layered, settings: LayeredSettings, generator: torch.Generator
) -> torch.Tensor:
    """Of one random batch."""
    rows = torch.randint(len(data.latents), (settings.batch,), generator=generator)
    told = partial(velocity, transformer, told=data, rows=rows)
    return flow_matching(told, data.latents[rows], generator)
