"""Which prompts a step trains on: a function of the step and the seed, whatever the prompts were put together from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import has_split, load_prompts
from omni_rollout.data.targets import targets_of
from omni_rollout.errors import UserError
from omni_rollout.types import Prompt


def prompt_data(config: TrainConfig) -> tuple[PromptStream, list[Prompt]]:
    """What a run trains on, and what its evaluations show: `evaluation.prompts`, else the `test` of a folder or dataset, else
    the same prompts. Of an algorithm that learns from a data set's images, what it trains on has them.

    Raises:
        UserError: see `load_prompts`.
    """
    targets = targets_of(config)
    given = config.prompts if isinstance(config.prompts, dict) else {config.prompts: 1.0}
    parts = [load_prompts(source, targets=targets) for source in given]
    mixture = [(len(part), weight) for part, weight in zip(parts, given.values(), strict=True)] if len(given) > 1 else None
    prompts = [prompt for part in parts for prompt in part]
    stream = PromptStream(prompts, config.rollout.prompts_per_step, config.sampling.seed, mixture)
    if targets is not None and not config.evaluation.images:
        return stream, []  # no reward is asked about any
    if config.evaluation.prompts:
        return stream, load_prompts(config.evaluation.prompts, "test")
    tests = [source for source in given if has_split(source, "test")]
    held_out = [prompt for source in tests for prompt in load_prompts(source, "test")] or prompts
    return stream, [replace(prompt, targets=()) for prompt in held_out]


def to_score(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those whose images a reward is asked about: all that the policy samples."""
    return [prompt for prompt in prompts if not prompt.targets]


class PromptStream:
    """Endless shuffled batches. A batch depends on the step and the seed alone, so a resumed run needs no state.

    An epoch is as many whole batches as the prompts fill, in an order drawn from (seed, epoch); prompts that would fill
    only part of a batch sit that epoch out. With fewer prompts than a batch, a batch repeats all of them, as evenly as it can.

    Args:
        mixture: (number of prompts, weight) of each part that `prompts` is put together from. An epoch is as long as without,
            and has of each part what its weight says, to the nearest whole; a part goes on in the next epoch where it stopped
            in this one.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        seed: int,
        mixture: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if not prompts:
            raise UserError("no prompts given: expected at least one")
        if prompts_per_step < 1:
            raise UserError(f"prompts_per_step={prompts_per_step}: expected at least 1")
        self.prompts = tuple(prompts)
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._mixture = mixture

    def batch(self, step: int) -> list[Prompt]:
        """The `prompts_per_step` prompts of one step, counted from 0."""
        if step < 0:
            raise UserError(f"step={step}: expected 0 or more")
        epoch, position = divmod(step, max(1, len(self.prompts) // self.prompts_per_step))
        order = list(range(len(self.prompts))) if self._mixture is None else list(self._mixed(self._mixture, epoch))
        # A string seed is hashed with SHA-512: neighbouring seeds and epochs are unrelated, on every machine.
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        first = position * self.prompts_per_step
        return [self.prompts[order[index % len(order)]] for index in range(first, first + self.prompts_per_step)]

    def _mixed(self, mixture: Sequence[tuple[int, float]], epoch: int) -> Iterator[int]:
        counts, first = in_an_epoch(len(self.prompts), [weight for _, weight in mixture]), 0
        for part, (size, _) in enumerate(mixture):
            for number in range(epoch * counts[part], (epoch + 1) * counts[part]):
                lap, position = divmod(number, size)
                yield first + self._lap(part, size, lap)[position]
            first += size

    @lru_cache(maxsize=64)  # noqa: B019  # one stream a run
    def _lap(self, part: int, size: int, lap: int) -> list[int]:
        order = list(range(size))
        random.Random(f"{self.seed}/{part}/{lap}").shuffle(order)
        return order


def in_an_epoch(whole: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, `whole` in sum: what rounding down leaves goes to the largest rests."""
    exact = [whole * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda part: counts[part] - exact[part])
    for part in by_rest[: whole - sum(counts)]:
        counts[part] += 1
    return counts
