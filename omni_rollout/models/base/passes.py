"""How much of a trajectory's work one pass through the transformer takes."""

from __future__ import annotations

from dataclasses import dataclass

from omni_rollout.config import TrainerConfig
from omni_rollout.models import family_module
from omni_rollout.types import SamplingSpec


def tokens_of_a_step(spec: SamplingSpec) -> int:
    """Image and text, of both guidance branches."""
    image = family_module(spec.family, "spec").layout(spec).tokens
    return image + spec.prompt_width + (image + spec.negative_prompt_width if spec.guided else 0)


@dataclass(frozen=True)
class PassLimit:
    """How many (trajectory, step) pairs share a pass of the trainer."""

    pairs: int  # at most
    tokens: int | None = None  # at most, where more than one pair shares it
    together: int = 1  # pairs that are not to be parted

    @classmethod
    def of_trainer(cls, trainer: TrainerConfig, together: int = 1) -> PassLimit:
        return cls(trainer.micro_batch_size, trainer.micro_batch_tokens, together)

    def holds(self, spec: SamplingSpec) -> int:
        """Pairs of trajectories of this spec."""
        held = self.pairs if self.tokens is None else min(self.pairs, self.tokens // tokens_of_a_step(spec))
        return max(held // self.together, 1) * self.together
