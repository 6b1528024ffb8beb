"""One forward of the policy, guidance included: the function that both samples and scores.

The engine calls it with vllm-omni's transformer, the trainer with diffusers'; everything around the network (casts,
mask rule, guidance) is here and in the family's `velocity.py`, so it cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from omni_rollout.diffusion.guidance import guide
from omni_rollout.models import family_module
from omni_rollout.types import RequestError, SamplingSpec

# (expert, encoder_hidden_states, encoder_hidden_states_mask, timestep, and what the family's `inputs` gives) -> prediction
Network = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What one request's transformer calls are told beside latents and time. L is the width the transformer sees."""

    prompt_embeds: torch.Tensor  # [L, D] model dtype
    prompt_embeds_mask: torch.Tensor  # [L] bool, right padded
    negative_prompt_embeds: torch.Tensor | None  # [L', D]; None: no guidance
    negative_prompt_embeds_mask: torch.Tensor | None
    spec: SamplingSpec
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)  # see `Layout.conditions`

    def guided(self, expert: int) -> bool:
        """Whether this expert's steps take a negative pass."""
        scales = family_module(self.spec.family, "velocity").scales
        return self.negative_prompt_embeds is not None and scales([self], expert)[0] > 1

    def passes(self, expert: int) -> int:
        """Forward passes that a step takes: guidance branches of one width share one."""
        negative = self.negative_prompt_embeds_mask
        return 2 if self.guided(expert) and negative is not None and len(negative) != len(self.prompt_embeds_mask) else 1

    def key(self, expert: int) -> tuple[object, ...]:
        """What rows of one forward pass must agree in: sizes, widths, whether a mask is needed, the network, guidance."""
        layout = family_module(self.spec.family, "spec").layout(self.spec)
        negative = self.negative_prompt_embeds_mask if self.guided(expert) else None
        renormalise = negative is not None and family_module(self.spec.family, "velocity").renormalise(self.spec)
        return (
            self.spec.family,
            layout.latent,
            layout.grid,
            tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.conditions.items())),
            len(self.prompt_embeds_mask),
            bool(self.prompt_embeds_mask.all()),
            None if negative is None else (len(negative), bool(negative.all()), renormalise),
            expert,
        )

    def batch_key(self, step: int) -> tuple[object, ...]:
        """Rows may share a forward pass when these agree, each at its own step."""
        return self.key(expert_at(self.spec, step))


def expert_at(spec: SamplingSpec, step: int) -> int:
    """Position among the family's `EXPERTS` of the network that computes this step."""
    return family_module(spec.family, "spec").expert(spec, step)


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
    *,
    expert: int = 0,
) -> torch.Tensor:
    """[B, *shape] fp32, guidance applied where asked for.

    Args:
        network: called with `expert` and the transformer's inputs; with guidance once for both branches where their widths
            agree, else once for each.
        latents: [B, *shape] fp32.
        timesteps: [B] fp32, 0 to 1000.
        conditions: B of one `key(expert)`.
        dtype: what the network computes in.
    """
    first = conditions[0]
    assert all(row.key(expert) == first.key(expert) for row in conditions), "rows of one batch must share their batch_key"
    family = family_module(first.spec.family, "velocity")

    def forward(embeds: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
        branches = len(embeds) // len(conditions)
        x, mask = torch.cat([latents] * branches), torch.stack(list(masks))
        prediction = network(
            expert=expert,
            encoder_hidden_states=torch.stack(list(embeds)).to(dtype),
            # One rule: no mask when nothing is padded. With and without one, attention may take different kernels.
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            timestep=family.timestep(torch.cat([timesteps] * branches), dtype),
            **family.inputs(x, [*conditions] * branches, dtype),
        )
        return family.output(prediction, x).float()

    embeds, masks = [row.prompt_embeds for row in conditions], [row.prompt_embeds_mask for row in conditions]
    if not first.guided(expert):
        return forward(embeds, masks)
    negative_embeds = [row.negative_prompt_embeds for row in conditions if row.negative_prompt_embeds is not None]
    negative_masks = [row.negative_prompt_embeds_mask for row in conditions if row.negative_prompt_embeds_mask is not None]
    if first.passes(expert) == 1:
        positive, negative = forward([*embeds, *negative_embeds], [*masks, *negative_masks]).chunk(2)
    else:
        positive, negative = forward(embeds, masks), forward(negative_embeds, negative_masks)
    scale = torch.tensor(family.scales(conditions, expert), dtype=torch.float32)
    return guide(positive, negative, scale, renormalise=family.renormalise(first.spec))
