"""Qwen-Image's relatives for tests: one engine and one policy over a random checkpoint, and requests of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models import family_module
from omni_rollout.models.base.images import made_image
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import InputImage, Prompt, RolloutRequest, Trajectory

PROMPTS = ("a photo of a cat", 'a red sign that says "42"', "dog")


def layered(number: int) -> tuple[dict[str, Any], tuple[InputImage, ...]]:
    """Two of each kind, so that there is company: 1 to 3 layers, two sizes, guidance with and without its norm."""
    kind = number // 2 % 4
    extra = {"layers": (2, 1, 3, 2)[kind], "cfg_normalize": kind == 3 and bool(number % 2)}
    return {"height": 96 if kind == 2 else 64, "width": 64, "extra": extra}, (made_image(number, 64, 80),)


def edit(number: int) -> tuple[dict[str, Any], tuple[InputImage, ...]]:
    """Two target sizes, two of the input image, two of what the text encoder is shown."""
    kind = number // 2 % 4
    sizes = {"image_sizes": [[64, 96 if kind == 1 else 64]], "vision_sizes": [[56, 112 if kind == 3 else 56]]}
    return {"height": 96 if kind == 2 else 64, "width": 64, "extra": sizes}, (made_image(number, 64, 80),)


def edit_plus(number: int) -> tuple[dict[str, Any], tuple[InputImage, ...]]:
    """One to three input images of sizes of their own."""
    kind = number // 2 % 4
    several = (2, 1, 3, 2)[kind]
    sizes = {
        "image_sizes": [[64, 96], [64, 64], [32, 64]][:several],
        "vision_sizes": [[56, 84], [56, 56], [56, 112]][:several],
    }
    images = tuple(made_image(10 * number + place, 64, 64 + 16 * place) for place in range(several))
    return {"height": 96 if kind == 2 else 64, "width": 64, "extra": sizes}, images


KINDS = {"qwen_image_layered": layered, "qwen_image_edit": edit, "qwen_image_edit_plus": edit_plus}
FAMILIES = tuple(KINDS)


class Relative:
    """The rollout engine and the trainer's policy of one family, with the same weights."""

    def __init__(self, family: str, dtype: str, folder: Path, places: int = 5, parity: str = "exact") -> None:
        self.family, self.dtype, self.checkpoint = family, getattr(torch, dtype), str(folder)
        if not (folder / "model_index.json").exists():
            build_random(folder, family=family, seed=3)
        self.spec = family_module(family, "spec")
        self.engine = RolloutEngine(self.checkpoint, family=family, dtype=dtype, max_num_seqs=places, parity=parity)
        self.policy = self.load_policy(parity)

    def load_policy(self, parity: str = "exact") -> Any:
        return family_module(self.family, "policy").load_policy(self.checkpoint, self.dtype, parity)

    def request(self, number: int, images: Sequence[InputImage], member: int = 0, **sampling: Any) -> RolloutRequest:
        defaults = {"num_inference_steps": 5, "true_cfg_scale": 1.0, "prompt_width": 64, "negative_prompt_width": 48}
        return RolloutRequest(
            request_id=f"request-{number}-{member}",
            prompt=Prompt(text=PROMPTS[number % 3], images=tuple(images)),
            spec=self.spec.resolve({**defaults, **sampling}, images),
            seed=100 * number + member,
            group_id=f"group-{number}",
            member=member,
        )

    def mixed(self) -> list[RolloutRequest]:
        """Eight: sizes of the family's own kinds, texts of three lengths, with and without guidance, 5 and 6 steps."""
        requests = []
        for number in range(8):
            sampling, images = KINDS[self.family](number)
            scale = 4.0 if number // 2 in (1, 3) else 1.0
            requests.append(
                self.request(number, images, true_cfg_scale=scale, num_inference_steps=5 + (number > 5), **sampling)
            )
        return requests

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return sorted(self.engine.generate(requests), key=lambda trajectory: trajectory.seed)

    def score(self, trajectories: Sequence[Trajectory], micro_batch_size: int = 3, policy: Any = None) -> list[torch.Tensor]:
        network = self.policy if policy is None else policy
        return recompute(network, trajectories, family=self.family, dtype=self.dtype, micro_batch_size=micro_batch_size)

    def equal(self, trajectories: Sequence[Trajectory], micro_batch_size: int = 3, policy: Any = None) -> list[bool]:
        scored = self.score(trajectories, micro_batch_size, policy)
        return [torch.equal(ours, one.log_probs) and len(ours) > 0 for ours, one in zip(scored, trajectories, strict=True)]

    def sync(self, policy: Any) -> None:
        self.engine.update_weights(effective_weights(policy, self.dtype), self.engine.policy_version + 1)
