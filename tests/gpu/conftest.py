"""One body for two devices: on a GPU at Qwen-Image's true width; on a CPU small, so that the tests' own code is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

IN_FLIGHT = 8


@dataclass(frozen=True)
class Size:
    model: dict[str, int]
    pixels: int


SIZES = {
    "cpu": Size({"layers": 1, "heads": 2, "head_dim": 32}, 32),
    # Two blocks of the real transformer: 24 heads of 128, text embeddings of 3584.
    "cuda": Size({"layers": 2, "heads": 24, "head_dim": 128, "joint_dim": 3584}, 512),
}
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if torch.cuda.is_available() != (request.param == "cuda"):
        pytest.skip("needs a CUDA device" if request.param == "cuda" else "the engine takes this machine's GPU")
    return request.param


@pytest.fixture(scope="module")
def checkpoint(device: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_random(tmp_path_factory.mktemp("random") / device, **SIZES[device].model))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sides(request: pytest.FixtureRequest, device: str, checkpoint: str) -> Iterator[Sides]:
    pair = Sides(device, checkpoint, request.param)
    yield pair
    pair.engine.close()


class Sides:
    """Engine and trainer's policy with the same weights."""

    def __init__(self, device: str, checkpoint: str, dtype: str) -> None:
        self.device, self.checkpoint, self.dtype = device, checkpoint, getattr(torch, dtype)
        self.pixels = SIZES[device].pixels
        self.engine = RolloutEngine(checkpoint, dtype=dtype, max_num_seqs=IN_FLIGHT)
        self.policy = self.load()
        self._count = self._version = 0

    def load(self) -> Any:
        return load_policy(self.checkpoint, self.dtype).to(self.device)

    def sync(self, policy: torch.nn.Module) -> None:
        self._version += 1
        self.engine.update_weights(effective_weights(policy, self.dtype), self._version)

    def requests(self, images: int, **sampling: Any) -> list[RolloutRequest]:
        size = {"height": self.pixels, "width": self.pixels, "num_inference_steps": 2, "true_cfg_scale": 1.0}
        self._count += 1
        return [
            RolloutRequest(
                request_id=f"{self._count}.{seed}",
                prompt=Prompt(text=["a cat", 'a red sign that says "42"'][seed % 2]),
                spec=resolve({**size, "prompt_width": 32, "negative_prompt_width": 32, **sampling}),
                seed=seed,
                group_id="group",
                member=seed,
            )
            for seed in range(images)
        ]

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return sorted(self.engine.generate(requests), key=lambda trajectory: trajectory.seed)

    def gap(self, trajectories: Sequence[Trajectory], micro_batch_size: int, policy: torch.nn.Module | None = None) -> float:
        """Largest difference between a rollout's log-prob and the trainer's."""
        scored = recompute(
            policy or self.policy,
            trajectories,
            family="qwen_image",
            dtype=self.dtype,
            micro_batch_size=micro_batch_size,
        )
        gaps = [(mine - theirs.log_probs).abs().max() for mine, theirs in zip(scored, trajectories, strict=True)]
        return float(torch.stack(gaps).max())
