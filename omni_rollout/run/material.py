"""What a run works with beside its model: prompts, what makes requests of them, and what scores the images."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoTokenizer

from omni_rollout.algorithms import get_algorithm
from omni_rollout.algorithms.base import Algorithm
from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.stream import PromptStream, prompt_data, to_score
from omni_rollout.models import family_module
from omni_rollout.rewards import WeightedSum, make_rewards
from omni_rollout.run.widths import check_widths, collator_of
from omni_rollout.types import Prompt, RolloutRequest


@dataclass(frozen=True, kw_only=True)
class Material:
    stream: PromptStream
    evaluation_prompts: list[Prompt]
    rewards: WeightedSum
    algorithm: Algorithm
    collator: Collator
    config: TrainConfig

    @classmethod
    def of(cls, config: TrainConfig) -> Material:
        """Raises UserError: a prompt that a reward cannot score, or the model cannot be given: all of them now, not one of
        them in an hour."""
        stream, evaluation_prompts = prompt_data(config)
        rewards, algorithm = make_rewards(config), get_algorithm(config.algorithm)
        rewards.check(to_score([*stream.prompts, *evaluation_prompts]), family_module(config.model.family, "spec").KIND)
        collator = collator_of(config, AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer"))
        check_widths(collator, stream.prompts, evaluation_prompts)
        return cls(
            stream=stream,
            evaluation_prompts=evaluation_prompts,
            rewards=rewards,
            algorithm=algorithm,
            collator=collator,
            config=config,
        )

    def requests(self, step: int) -> list[RolloutRequest]:
        """Of step 1, 2, ...: a function of the step alone."""
        return self.collator.groups(self.stream.batch(step), step, self.config.rollout.group_size)

    def evaluation(self, name: str) -> list[RolloutRequest]:
        return self.collator.evaluation(self.evaluation_prompts, self.config.evaluation, name)
