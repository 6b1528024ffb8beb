"""What of a configuration decides about memory, and a line of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from types import ModuleType

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import DType, Reduce, TrainConfig, TrainerEngineName
from omni_rollout.models import family_module
from omni_rollout.models.base.sizes import Pass, Sizes
from omni_rollout.types import Layout, SamplingSpec


class When(StrEnum):
    """Phases, which take turns where engine and trainer are in one process: see `run/phases.py`."""

    start = "start"  # as the trainer is loaded beside the engine
    rollout = "rollout"
    update = "update"
    sync = "sync"  # and saving


ALWAYS = tuple(When)


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    bytes: int
    why: str
    when: tuple[When, ...] = ALWAYS


@dataclass(frozen=True, kw_only=True)
class Run:
    """What of a configuration decides about memory."""

    config: TrainConfig
    spec: SamplingSpec
    sizes: Sizes
    reserve: int  # bytes, of each process, that are not derived

    @property
    def item(self) -> int:
        return 2 if self.config.model.dtype is DType.bfloat16 else 4

    @property
    def rank(self) -> int:
        """Of LoRA; 0: full weights."""
        return self.config.trainer.lora_rank

    @property
    def parameters(self) -> int:
        """Of all experts."""
        return self.sizes.experts * self.sizes.transformer.parameters

    @property
    def trained(self) -> int:
        of_one = self.sizes.transformer.lora_parameters(self.rank)
        return self.sizes.experts * of_one if self.rank else self.parameters

    @property
    def adapted(self) -> int:
        """Weights that LoRA is added to."""
        return self.sizes.experts * self.sizes.transformer.adapted_parameters

    @property
    def in_turns(self) -> bool:
        """Whether what is offloaded comes back for its phase: the other engines compute with it where it is."""
        return self.config.trainer.engine is TrainerEngineName.torch

    @property
    def shared(self) -> bool:
        """Whether in one process the trainer computes with weights of the engine's; as `Learner.shared`."""
        if self.config.trainer.engine is not TrainerEngineName.torch:
            return False
        alone = not self.config.trainer.ema_decay and not get_algorithm(self.config.algorithm).keeps_old
        return bool(self.rank) or (alone and self.config.model.dtype is DType.float32)

    @property
    def master(self) -> int:
        """Bytes of a weight of the policy as the trainer holds it: as the checkpoint has it where it is frozen."""
        kept = self.rank and self.config.trainer.engine is not TrainerEngineName.deepspeed
        return self.sizes.transformer_item if kept else 4

    @property
    def widths(self) -> list[int]:
        """Text tokens of each guidance branch."""
        return [self.spec.prompt_width] + ([self.spec.negative_prompt_width] if self.spec.negative_prompt is not None else [])

    @property
    def activations(self) -> ModuleType:
        """Of the family: what its passes hold."""
        return family_module(self.spec.family, "activations")

    @property
    def layout(self) -> Layout:
        return family_module(self.spec.family, "spec").layout(self.spec)

    @property
    def conditions(self) -> int:
        """Numbers that one request is told beside its text."""
        shapes = self.layout.conditions.values()
        return sum(prod(self.sizes.transformer.channels if size is None else size for size in shape) for shape in shapes)

    def passes(self, rows: int) -> list[Pass]:
        """Guidance branches of one width share a pass, as in `models/base/velocity.py`."""
        image = self.layout.tokens
        one = Pass(rows=rows, image_tokens=image, text_tokens=0, item=self.item, master=self.master)
        branches = Counter(self.widths)
        return [replace(one, rows=number * rows, text_tokens=width) for width, number in branches.items()]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Over how many ranks a trainer engine cuts what."""

    weights: int
    gradients: int
    moments: int

    @classmethod
    def of(cls, config: TrainConfig, ranks: int) -> Sharing:
        engine, stage = config.trainer.engine, config.trainer.zero_stage
        if engine is TrainerEngineName.fsdp2:
            return cls(weights=ranks, gradients=ranks if config.trainer.reduce is Reduce.backward else 1, moments=ranks)
        if engine is TrainerEngineName.torch:
            return cls(weights=1, gradients=1, moments=1)
        return cls(weights=ranks if stage == 3 else 1, gradients=ranks if stage >= 2 else 1, moments=ranks if stage >= 1 else 1)


def total(parts: Sequence[Part]) -> int:
    """Of the phase that needs most."""
    return max(phases(parts).values())


def phases(parts: Sequence[Part]) -> dict[When, int]:
    return {when: sum(part.bytes for part in parts if when in part.when) for when in When}
