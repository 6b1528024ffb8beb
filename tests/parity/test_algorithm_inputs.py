"""What an algorithm is given, by the trainer's network on the real engine's trajectories: each number is what its name says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch

from omni_rollout.algorithms.base import Coupled, Forward, Samples, Steps, element_means
from omni_rollout.config import ModelConfig, TrainConfig, TrainerConfig
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.policy.inputs import Inputs, Rows
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.recompute import Pair, predict, score, stochastic_pairs
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

SEEN: list[Any] = []  # what losses were given, micro-batch after micro-batch


class Recording(Coupled):
    recalls: ClassVar[bool] = True

    def policy_loss(self, steps: Steps) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        SEEN.append(steps)
        return -steps.advantages * (steps.log_probs - steps.old_log_probs).exp(), {"seen": steps.sigma}


@dataclass
class RecordingForward(Forward):
    recalls: ClassVar[bool] = True
    keeps_old: ClassVar[bool] = True
    shares_noise: ClassVar[bool] = True
    rows_together: ClassVar[int] = 2
    decay: float = 0.75

    def units(self, advantages: Sequence[float], group_ids: Sequence[str]) -> list[tuple[int, ...]]:
        return [(0, 1), (2, 3)]

    def steps(self, count: int, draw: Random) -> list[int]:
        return sorted(draw.sample(range(count), 3))

    def old_decay(self, updates: int) -> float:
        return self.decay

    def sample_loss(self, samples: Samples) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        SEEN.append(samples)
        return element_means((samples.velocity - samples.target) ** 2), {}


@pytest.fixture(scope="module")
def sampled(random_checkpoint: Path) -> Iterator[dict[str, list[Trajectory]]]:
    """Guided ones, of two groups of two, by sde steps and by the ode."""
    engine = RolloutEngine(str(random_checkpoint), family="qwen_image", dtype="float32", max_num_seqs=4)
    try:
        yield {
            kind: sorted(engine.generate([request(index, kind) for index in range(4)]), key=lambda one: one.request_id)
            for kind in ("sde", "ode")
        }
    finally:
        engine.close()


def request(index: int, sde_type: str) -> RolloutRequest:
    sampling = {"height": 64, "width": 64, "num_inference_steps": 4, "true_cfg_scale": 2.0, "sde_type": sde_type}
    group, member = divmod(index, 2)
    return RolloutRequest(
        request_id=f"group{group}-{member:02d}",
        prompt=Prompt(text=["a cat", "a red sign that says 42"][group]),
        spec=resolve({**sampling, "prompt_width": 24, "negative_prompt_width": 16}),
        seed=index,
        group_id=f"group{group}",
        member=member,
    )


def learner(checkpoint: Path, algorithm: Any, **trainer: Any) -> Learner:
    SEEN.clear()
    given = {"learning_rate": 1e-2, "warmup_steps": 0, "micro_batch_size": 4, "updates_per_step": 2, **trainer}
    settings = TrainerConfig(**given)
    return Learner(TrainConfig(model=ModelConfig(path=str(checkpoint)), algorithm=algorithm, trainer=settings))


ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5])


@torch.no_grad()
def test_the_old_mean_is_the_policys_before_its_first_update(
    random_checkpoint: Path, sampled: dict[str, list[Trajectory]]
) -> None:
    rows, trained = sampled["sde"], learner(random_checkpoint, Recording())
    pairs = stochastic_pairs(rows)
    before = [score(trained.policy, rows, [pair], "qwen_image", torch.float32).mean[0] for pair in pairs]
    with torch.enable_grad():
        update, _ = trained.step(rows, ADVANTAGES, [one.log_probs for one in rows], 1)
    assert len(update.grad_norms) == 2 and update.metrics["actor/seen"]
    found = [(steps, row) for steps in SEEN for row in range(len(steps.mean))]
    assert len(found) == len(pairs) == 12
    for steps, row in found:
        assert any(torch.equal(steps.old_mean[row], mean) for mean in before)
    moved = [not torch.equal(steps.mean[row].detach(), steps.old_mean[row]) for steps, row in found]
    assert moved == [False] * 6 + [True] * 6, "the first mini-batch is before any update, the second after one"


def test_a_limit_of_tokens_is_the_limit_of_as_many_pairs(random_checkpoint: Path, sampled: dict[str, list[Trajectory]]) -> None:
    rows, tokens = sampled["sde"], 2 * 16 + 24 + 16  # of a pair, guidance included
    results = []
    for limits in ({}, {"micro_batch_size": 64, "micro_batch_tokens": 5 * tokens - 1}, {"micro_batch_tokens": tokens}):
        trained = learner(random_checkpoint, Recording(), **limits)
        update, _ = trained.step(rows, ADVANTAGES, [one.log_probs for one in rows], 1)
        results.append(
            (update, [len(steps.mean) for steps in SEEN], [weight.detach() for weight in trained.policy.parameters()])
        )
    (first, lengths, weights), (other, same, others), (_, alone, _) = results
    assert lengths == same == [4, 2, 4, 2] and alone == [1] * 12
    assert first.grad_norms == other.grad_norms and all(map(torch.equal, weights, others))


@torch.no_grad()
def test_what_a_forward_algorithm_is_given(random_checkpoint: Path, sampled: dict[str, list[Trajectory]]) -> None:
    rows, trained = sampled["ode"], learner(random_checkpoint, RecordingForward())
    assert all(one.latents.shape[0] == 1 and not len(one.log_probs) for one in rows)
    assert trained.old is not None
    for part in trained.old.parts.values():  # another policy, so that it cannot be taken for the trained one
        part.mul_(1.5)
    start, old = ({name: part.clone() for name, part in parts.items()} for parts in (trained.engine.parts(), trained.old.parts))
    with torch.enable_grad():
        update, _ = trained.step(rows, ADVANTAGES, [one.log_probs for one in rows], 1)
    assert len(update.grad_norms) == 2 and not update.first.log_probs and len(SEEN) == 4  # 3 times of a pair: 4 and 2 rows
    end = {name: part.clone() for name, part in trained.engine.parts().items()}
    assert not all(torch.equal(start[name], part) for name, part in end.items())
    for name, part in trained.old.parts.items():
        torch.testing.assert_close(part, 0.75 * old[name] + 0.25 * end[name], rtol=1e-5, atol=1e-7)
    for samples in SEEN:
        share = samples.sigma[:, None, None]
        assert torch.equal(samples.sample, (1 - share) * samples.x0 + share * samples.noise)
        for row in range(0, len(samples.sigma), 2):
            assert torch.equal(samples.noise[row], samples.noise[row + 1]) and samples.sigma[row] == samples.sigma[row + 1]
            assert not torch.equal(samples.x0[row], samples.x0[row + 1])
            places = [place_of(rows, samples, row + member) for member in (0, 1)]
            assert rows[places[0].row].group_id == rows[places[1].row].group_id
            for member, place in enumerate(places):
                for name, parts in (("first_velocity", start), ("old_velocity", old)):
                    expected = velocity_under(trained, parts, rows, place, samples.sample[row + member])
                    assert torch.equal(getattr(samples, name)[row + member], expected), name
    assert all(torch.equal(part, end[name]) for name, part in trained.engine.parts().items()), "swapped back"


def place_of(rows: list[Trajectory], samples: Samples, row: int) -> Pair:
    """Which trajectory, and which of its times, a row is."""
    (trajectory,) = [place for place, one in enumerate(rows) if torch.equal(one.latents[-1], samples.x0[row])]
    return Pair(trajectory, rows[trajectory].sigmas.tolist().index(float(samples.sigma[row])))


def velocity_under(
    trained: Learner, parts: dict[str, torch.Tensor], rows: list[Trajectory], pair: Pair, sample: torch.Tensor
) -> torch.Tensor:
    """Without guidance: of a trajectory that had none."""
    plain = [
        replace(one, negative_prompt_embeds=None, negative_prompt_embeds_mask=None, spec=replace(one.spec, true_cfg_scale=1.0))
        for one in rows
    ]
    own = {name: part.clone() for name, part in trained.engine.parts().items()}
    try:
        for name, part in trained.engine.parts().items():
            part.copy_(parts[name])
        return predict(trained.policy, plain, [pair], sample[None], "qwen_image", torch.float32)[0]
    finally:
        for name, part in trained.engine.parts().items():
            part.copy_(own[name])


def test_times_and_noise_hang_on_seed_and_request_alone(random_checkpoint: Path, sampled: dict[str, list[Trajectory]]) -> None:
    trained = learner(random_checkpoint, RecordingForward())
    inputs: Inputs = trained.update._inputs
    rows = Rows(trajectories=sampled["ode"], advantages=ADVANTAGES, old_log_probs=[], seed=5)
    noise, again = ([inputs._noise(rows, one, step) for one in sampled["ode"] for step in (0, 1)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(noise, again, strict=True))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[4])
    assert not torch.equal(noise[0], inputs._noise(replace(rows, seed=6), sampled["ode"][0], 0))
