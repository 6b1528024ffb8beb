"""Records that pass between the stages, left to right: Prompt -> RolloutRequest -> Trajectory.

Shape letters: T stochastic steps, N denoising steps, S image tokens, C packed channels, L text width, D embedding size,
F frames, H and W pixels; `*shape` is whatever a family's latent has. Every record is frozen; a stage makes a new one instead of
changing what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `--help` must not pay for torch
    import numpy as np
    import torch

SDEType = Literal["sde", "cps", "dance_sde", "ode"]
LogProbForm = Literal["gaussian", "unnormalised"]
Kind = Literal["image", "video", "layers"]
KINDS: dict[tuple[int, int], Kind] = {(3, 3): "image", (4, 3): "video", (4, 4): "layers"}  # of media, by ndim and channels


class RequestError(ValueError):
    """A request that cannot be served as asked; raised before it reaches the engine, for that request alone."""


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """A picture that a prompt speaks of. Its pixels stay in the file; the rollout refuses one whose sha256 differs."""

    path: str
    sha256: str
    height: int  # pixels
    width: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a dataset. Made by `prompts`, read by `collate` and by the rewards."""

    text: str
    images: tuple[InputImage, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what rewards need, e.g. {"text": "42"}

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "images": [asdict(image) for image in self.images], "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Prompt:
        return cls(**{**values, "images": tuple(InputImage(**image) for image in values.get("images", ()))})


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """What one request means, every number explicit: resolved once by a model family's `spec.resolve`.

    The engine obeys it, the response echoes it, the trajectory stores it, the trainer scores by it.
    """

    height: int  # pixels
    width: int  # pixels
    num_inference_steps: int
    true_cfg_scale: float  # 1.0 and below: guidance is off
    negative_prompt: str | None  # present exactly when guidance is on
    noise_level: float
    sde_type: SDEType
    log_prob_form: LogProbForm
    step_indices: tuple[int, ...]  # the stochastic steps; all others are deterministic (ode)
    prompt_width: int  # text tokens the transformer sees, padding included
    negative_prompt_width: int
    family: str = "qwen_image"  # whose `spec.resolve` made it; capsules of format 1 do not say
    extra: Mapping[str, Any] = field(default_factory=dict)  # what this family has beside, JSON types only

    @property
    def guided(self) -> bool:
        return self.negative_prompt is not None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SamplingSpec:
        return cls(**{**values, "step_indices": tuple(values["step_indices"])})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes that follow from one spec, by its family's `spec.layout`: all that shared code asks about them.

    In a shape, None is any size but 0.
    """

    latent: tuple[int | None, ...]  # of one sample, without batch
    media: tuple[int, ...]
    grid: tuple[tuple[int, int, int], ...]  # (frames, rows, columns) in tokens of every picture the transformer sees
    conditions: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)  # in the network's dtype
    frames: int = 1  # what the engine's batch key is told

    @property
    def tokens(self) -> int:
        """Of one guidance branch, text not counted: target and conditions."""
        return sum(frames * rows * columns for frames, rows, columns in self.grid)


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One image to sample. Made by `collate`, consumed by `RolloutEngine.generate`."""

    request_id: str
    prompt: Prompt
    spec: SamplingSpec
    seed: int
    group_id: str  # members of one group share the prompt; advantages are taken within it
    member: int


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sample's denoising: all that is needed to score it again, and nothing else.

    Made by the rollout, consumed by rewards, recompute and the monitor. All tensors are on the CPU.
    """

    latents: torch.Tensor  # [T+1, *shape] fp32: before each stochastic step, and after the last; T = 0 (ode): the final ones
    log_probs: torch.Tensor  # [T] fp32, by the rollout; mean over the elements of *shape
    step_indices: torch.Tensor  # [T] int64, positions in `sigmas`
    sigmas: torch.Tensor  # [N+1] fp32, after the shift, ends with 0
    timesteps: torch.Tensor  # [N] fp32, 1000 * sigma
    prompt_embeds: torch.Tensor  # [L, D] model dtype
    prompt_embeds_mask: torch.Tensor  # [L] bool, right padded
    negative_prompt_embeds: torch.Tensor | None  # [L', D]; present exactly when guidance was on
    negative_prompt_embeds_mask: torch.Tensor | None
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)  # beside text, model dtype; see `Layout`
    media: np.ndarray  # uint8: image [H, W, 3], video [F, H, W, 3], layers [L, H, W, 4]
    prompt: Prompt
    spec: SamplingSpec
    seed: int
    group_id: str
    member: int
    policy_version: int
    fingerprint: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        return KINDS[self.media.ndim, self.media.shape[-1]]

    @property
    def image(self) -> np.ndarray:
        """[H, W, 3] uint8, of a trajectory that made an image."""
        assert self.kind == "image", f"this trajectory made {self.kind}, see `media`"
        return self.media

    @property
    def request_id(self) -> str:
        return f"{self.group_id}-{self.member:02d}"
