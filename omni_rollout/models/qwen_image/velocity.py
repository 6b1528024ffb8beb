"""One forward of the policy, guidance included: the function that both samples and scores.

The engine calls it with vllm-omni's transformer, the trainer with diffusers'; everything around the network (casts,
mask rule, image grid, guidance) is here, so it cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from omni_rollout.diffusion.guidance import guide
from omni_rollout.diffusion.schedule import model_timestep
from omni_rollout.models.qwen_image.spec import SIZE_MULTIPLE
from omni_rollout.types import RequestError

# (hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes) -> [B, S, C]
Network = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What one request's transformer calls are told beside latents and time. L is the width the transformer sees."""

    prompt_embeds: torch.Tensor  # [L, D] model dtype
    prompt_embeds_mask: torch.Tensor  # [L] bool, right padded
    negative_prompt_embeds: torch.Tensor | None  # [L', D]; None: no guidance
    negative_prompt_embeds_mask: torch.Tensor | None
    true_cfg_scale: float
    height: int  # pixels
    width: int

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Rows may share a forward pass when these agree: sizes, widths, and whether a mask is needed."""
        negative = self.negative_prompt_embeds_mask
        return (
            self.height,
            self.width,
            len(self.prompt_embeds_mask),
            bool(self.prompt_embeds_mask.all()),
            None if negative is None else (len(negative), bool(negative.all())),
        )


def pad_to_width(embeds: torch.Tensor, mask: torch.Tensor, width: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pads [n, D] embeddings and their [n] mask to [width, D] and [width].

    Raises:
        RequestError: more valid tokens than `width`, or a mask that is not right padded.
    """
    mask = mask.bool()
    valid = int(mask.sum())
    if not bool(mask[:valid].all()):
        raise RequestError(f"{what}: its mask is not right padded; only masks of the form 1...10...0 can be served")
    if valid > width:
        raise RequestError(f"{what} has {valid} text tokens, the fixed width is {width}; shorten it or raise the width")
    padded = embeds.new_zeros(width, embeds.shape[1])
    padded[:valid] = embeds[:valid]
    return padded, torch.arange(width, device=mask.device) < valid


def velocity(
    network: Network,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: Sequence[Conditioning],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[B, S, C] fp32, guidance applied where asked for.

    Args:
        network: the transformer, called once for the prompts and once for the negative prompts.
        latents: [B, S, C] fp32.
        timesteps: [B] fp32, 0 to 1000.
        conditions: B of one `batch_key`.
        dtype: what the network computes in.
    """
    first = conditions[0]
    assert all(row.batch_key == first.batch_key for row in conditions), "rows of one batch must share their batch_key"
    grid = (1, first.height // SIZE_MULTIPLE, first.width // SIZE_MULTIPLE)

    def branch(embeds: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
        mask = torch.stack(masks)
        return network(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=torch.stack(embeds).to(dtype),
            # One rule: no mask when nothing is padded. With and without one, attention may take different kernels.
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            timestep=model_timestep(timesteps, dtype),
            img_shapes=[[grid]] * len(embeds),
        ).float()

    positive = branch([row.prompt_embeds for row in conditions], [row.prompt_embeds_mask for row in conditions])
    negatives = [row.negative_prompt_embeds for row in conditions if row.negative_prompt_embeds is not None]
    negative_masks = [row.negative_prompt_embeds_mask for row in conditions if row.negative_prompt_embeds_mask is not None]
    if not negatives:
        return positive
    scale = torch.tensor([row.true_cfg_scale for row in conditions], dtype=torch.float32)
    return guide(positive, branch(negatives, negative_masks), scale)
