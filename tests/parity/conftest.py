"""A small random checkpoint of the true architecture, and one engine at a time over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

PROMPTS = [
    "a photo of a cat",
    'a red sign that says "42"',
    "dog",
    'a blue sign that says "7" on a table beside two cats',
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("random")
    build_random(folder, layers=3, seed=3)
    return str(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sides(request: pytest.FixtureRequest, checkpoint: str) -> Iterator[Sides]:
    pair = Sides(checkpoint, request.param)
    yield pair
    pair.engine.close()


class Sides:
    """The rollout engine and the trainer's policy, with the same weights."""

    def __init__(self, checkpoint: str, dtype: str) -> None:
        self.checkpoint = checkpoint
        self.dtype = getattr(torch, dtype)
        self.engine = RolloutEngine(checkpoint, dtype=dtype, max_num_seqs=5)
        self.policy = load_policy(checkpoint, self.dtype)
        self.original = {name: value.clone() for name, value in self.policy.state_dict().items()}
        self.version = 0
        self._count = 0

    def request(self, seed: int, text: str, **sampling: Any) -> RolloutRequest:
        self._count += 1
        defaults = {"height": 64, "width": 64, "num_inference_steps": 6, "true_cfg_scale": 1.0, "prompt_width": 32}
        return RolloutRequest(
            request_id=f"request-{self._count}",
            prompt=Prompt(text=text),
            spec=resolve({**defaults, "negative_prompt_width": 16, **sampling}),
            seed=seed,
            group_id=f"group-{seed}",
            member=0,
        )

    def mixed(self) -> list[RolloutRequest]:
        """Eight requests: prompts of four lengths, without guidance, and with it in two passes or in one, 6 to 8 steps."""
        scales, widths = [1.0, 4.0, 2.5], [16, 32]
        return [
            self.request(
                i,
                PROMPTS[i % 4],
                true_cfg_scale=scales[i % 3],
                num_inference_steps=6 + i % 3,
                negative_prompt_width=widths[i // 4],
            )
            for i in range(8)
        ]

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return sorted(self.engine.generate(requests), key=lambda trajectory: trajectory.seed)

    def score(self, trajectories: Sequence[Trajectory], micro_batch_size: int = 16) -> list[torch.Tensor]:
        return recompute(self.policy, trajectories, family="qwen_image", dtype=self.dtype, micro_batch_size=micro_batch_size)

    def sync(self) -> None:
        self.version += 1
        self.engine.update_weights(effective_weights(self.policy, self.dtype), self.version)

    def disturb(self, size: float = 0.02, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    def restore(self) -> None:
        self.policy.load_state_dict(self.original)
        self.sync()

    @property
    def pipeline(self) -> Any:
        return self.engine.pipeline


def equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def all_equal() -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], bool]:
    return equal
