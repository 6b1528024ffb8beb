"""What goes over the wire on verl: LoRA factors in place of weights, and to a rank the rows that it computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl")

from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import TrainConfig, TrainerConfig
from omni_rollout.errors import WeightSyncError
from omni_rollout.integrations.verl.records import Weights, from_fields, size_of, to_fields, to_section
from omni_rollout.integrations.verl.server import RolloutServer
from omni_rollout.launch.compose import compose
from omni_rollout.models.base.policy import batch_keys
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.update import PolicyUpdate
from omni_rollout.trajectories.digest import combined_digest, tensor_digests
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

RANK, ALPHA = 2, 6


class Sent(Weights):
    """In place of Ray's object store: `buckets` are what lies in it."""

    def fetch(self) -> list[tuple[str, torch.Tensor]]:
        return [named for bucket in self.buckets for named in bucket]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def config(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("a red cat\n")
    lora = [f"trainer.lora_rank={RANK}", f"trainer.lora_alpha={ALPHA}", "trainer.learning_rate=1e-2", "threads=1"]
    more = [f"prompts={folder / 'prompts.txt'}", f"run_dir={folder / 'run'}", "backend=verl", "model.dtype=bfloat16"]
    return compose([f"model.path={random_checkpoint}", *more, *lora, "rollout.ahead=1", "trainer.ema_decay=0.5"])


@pytest.fixture(scope="module")
def server(config: TrainConfig) -> Iterator[RolloutServer]:
    server = RolloutServer(to_section(config))
    yield server
    server.engine.close()


@pytest.fixture(scope="module")
def trajectories(server: RolloutServer) -> list[Trajectory]:
    sampling = {"height": 64, "width": 64, "num_inference_steps": 3, "true_cfg_scale": 2.0, "prompt_width": 24}
    requests = [
        RolloutRequest(
            request_id=f"request-{index}",
            prompt=Prompt(text=["a cat", "a red sign that says 42"][index % 2]),
            spec=resolve({**sampling, "negative_prompt_width": 16}),
            seed=index,
            group_id="group",
            member=index,
        )
        for index in range(4)
    ]
    return sorted(server.engine.generate(requests), key=lambda one: one.request_id)


@pytest.fixture(scope="module")
def learner(config: TrainConfig, trajectories: list[Trajectory]) -> Learner:
    """After an update, so that no factor is zero and the policies differ."""
    learner = Learner(config)
    rewards = torch.tensor([1.0, -1.0, 0.5, -0.5])
    learner.step(trajectories, rewards, [one.log_probs for one in trajectories], 1)
    return learner


def published(learner: Learner, which: Any, **changes: Any) -> tuple[Weights, int]:
    """As a rank puts it up; and the bytes of what is merged from it."""
    whole = list(learner.weights(which))
    adapter = learner.adapter(which)
    assert adapter is not None and (adapter.rank, adapter.alpha) == (RANK, ALPHA)
    digest = combined_digest(tensor_digests(whole))
    sent = Sent(version=1, digest=digest, buckets=(list(adapter.factors.items()),), lora_scale=ALPHA / RANK)  # type: ignore[arg-type]
    return replace(sent, **changes), size_of(dict(whole))


def test_factors_become_the_bits_that_the_ranks_compute_with(learner: Learner, server: RolloutServer) -> None:
    digests = set()
    for which in ("policy", "average", "behaviour", "policy"):
        weights, whole = published(learner, which)
        assert server.load(weights) == weights.digest
        held = server.engine.policy_tensors()
        assert all(torch.equal(held[name], tensor) for name, tensor in learner.weights(which))
        digests.add(weights.digest)
        factors = size_of(dict(weights.fetch()))
        print(f"{which}: {factors} bytes sent, {whole} merged, 1 in {whole / factors:.0f}")
        assert factors < whole / 20
    assert len(digests) == 3


def test_what_is_merged_to_other_bits_is_refused(learner: Learner, server: RolloutServer) -> None:
    weights, _ = published(learner, "policy", version=2, lora_scale=ALPHA / RANK * 1.01)
    with pytest.raises(WeightSyncError, match="version 2: the engine holds"):
        server.load(weights)


def test_a_row_of_another_rank_is_known_but_for_its_numbers(trajectories: list[Trajectory]) -> None:
    told, large = ([to_fields(one)[name] for one in trajectories] for name in ("trajectory", "tensors"))
    whole = [from_fields(row, tensors) for row, tensors in zip(told, large, strict=True)]
    outlines = [from_fields(row) for row in told]
    assert batch_keys(whole) == batch_keys(outlines) == batch_keys(trajectories)
    for field in fields(Trajectory):
        for one, other in zip(trajectories, whole, strict=True):
            mine, same = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(mine, same) if isinstance(mine, torch.Tensor) else field.name == "media" or mine == same
    with pytest.raises(NotImplementedError, match="meta"):
        outlines[0].latents.to("cpu")
    little, much = size_of(told[0]) - told[0]["media"].nbytes, size_of(large[0])
    print(f"a trajectory: {little} bytes for every rank, {much} for the one that computes with it")
    assert 10 * little < much


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_rank_is_sent_its_rows_alone(trajectories: list[Trajectory], recomputed: bool) -> None:
    """Sixteen rows, of which four teach nothing: how many bytes the rank that gets most is sent, and was sent before."""
    rows = [replace(one, group_id=str(place % 4), member=place) for place, one in enumerate(trajectories * 4)]
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.5] * 4)
    sizes = [size_of(to_fields(one)["tensors"]) for one in rows]
    told = sum(size_of(to_fields(one)["trajectory"]) - one.media.nbytes for one in rows)
    for ranks in (1, 2, 4):
        engine: Any = None
        updates = [
            PolicyUpdate(
                engine,
                FlowGRPO(),
                TrainerConfig(micro_batch_size=2),
                family="qwen_image",
                dtype=torch.float32,
                rank=rank,
                ranks=ranks,
            )
            for rank in range(ranks)
        ]
        needed = [update.needed(rows, advantages, 7, recomputed=recomputed) for update in updates]
        shares = updates[0].shares(rows, advantages, 7)
        assert sorted(row for share in shares for row in share) == list(range(16)), "each row once"
        assert all(needs == set(share) for needs, share in zip(needed, shares, strict=True)), "and nothing to fill up with"
        most = max(sum(sizes[row] for row in needs) for needs in needed)
        print(f"{ranks} ranks: {told + most} bytes to the rank that gets most, {told + sum(sizes)} before")
        assert most <= sum(sizes) / ranks * 1.1
