"""Named rewards: found, checked, called within limits, and summed with weights; each one kept for the metrics."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import signature
from statistics import fmean, pstdev
from types import ModuleType
from typing import cast

import numpy as np

from omni_rollout import plugins
from omni_rollout.config import RewardConfig, RewardNormalise, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.rewards.base import call
from omni_rollout.rewards.base.contract import Reward, RewardBatch, RewardError, texts_and_columns
from omni_rollout.rewards.base.http import RemoteReward
from omni_rollout.types import Kind, Prompt

STD_EPS = 1e-4  # added to a group's standard deviation, as flow_grpo adds it to that of the sum


def get_reward(
    name: str,
    threads: int = 1,
    source: str | None = None,
    timeout: float = RewardConfig.timeout,
    model: str | None = None,
) -> Reward:
    """The reward of this name, which may use `threads` CPU threads.

    Args:
        source: where it is: a function's name (see `omni_rollout.plugins`), or the http(s) address of a server. None: a file in
            `omni_rollout/rewards/`, or what another package registered in the entry point group `omni_rollout.rewards`.
        model: folder, hub id or address, for a reward of this package that is read off a model.

    Raises:
        UserError: no such reward, a model for one that has none, or fewer than one thread.
    """
    if threads < 1:
        raise UserError(f"reward.threads={threads}: expected at least 1")
    if source is not None:
        key = f"reward.source.{name}"
        return RemoteReward(key, source, timeout) if plugins.is_address(source) else plugins.load_function(key, source)
    known = plugins.registered("rewards")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"reward {name!r} is unknown; did you mean {near[0]!r}? Known: {', '.join(known)}")
    point = plugins.entry("omni_rollout.rewards", name)
    if point is not None:
        return plugins.load_entry(point)
    module = import_module(f"omni_rollout.rewards.{name}")
    make: Callable[..., Reward] = getattr(module, "make", None) or _plain(module, name)
    if model is not None and "model" not in signature(make).parameters:
        raise UserError(f"reward.model.{name}={model}: this reward is read off no model; leave it out")
    return make(threads) if model is None else make(threads, model)


def _plain(module: ModuleType, name: str) -> Callable[[int], Reward]:
    """Of a file of `omni_rollout/rewards` without `make`: the function that has the file's own name."""
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"reward {name}: {module.__file__} has neither make(threads), which returns the reward, nor {name}(images, "
            "prompts, metadata), which is one; add either, or take a function of any file: "
            f"reward.source.{name}=path/to/file.py:FUNCTION"
        )
    return lambda threads: cast(Reward, function)


def make_rewards(config: TrainConfig) -> WeightedSum:
    """The rewards of a run, and those that its evaluations add."""
    return WeightedSum(config.reward.weights, settings=config.reward, untrained=config.evaluation.reward.weights)


class WeightedSum:
    """Sum of named rewards times their weights.

    Args:
        settings: threads, sources, limits; its own weights are not read.
        untrained: name -> weight of rewards that evaluations measure, and nothing is trained on.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        threads: int = 1,
        *,
        settings: RewardConfig | None = None,
        untrained: Mapping[str, float] | None = None,
    ) -> None:
        if not weights:
            raise UserError("reward.weights is empty: expected at least one `name: weight`")
        for name, weight in {**(untrained or {}), **weights}.items():
            if not math.isfinite(weight):
                raise UserError(f"reward.weights.{name}={weight}: expected a finite number")
        self.settings = settings or RewardConfig(threads=threads)
        self.weights, self.untrained = dict(weights), dict(untrained or {})
        self.rewards = {name: self._get(name) for name in [*self.weights, *(set(self.untrained) - set(self.weights))]}

    def _get(self, name: str) -> Reward:
        own = self.settings
        return get_reward(name, own.threads, own.source.get(name), own.timeout, own.model.get(name))

    def check(self, prompts: Sequence[Prompt], kind: Kind) -> None:
        """Raises UserError where a reward cannot score what the model makes, or a prompt; before anything is sampled."""
        for name, reward in self.rewards.items():
            kinds = getattr(reward, "kinds", frozenset({kind}))
            if kind not in kinds:
                raise UserError(f"reward {name} scores {' and '.join(sorted(kinds))}, this model makes {kind}")
            if (check := getattr(reward, "check", None)) is not None:
                check(*texts_and_columns(prompts))

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> RewardBatch:
        breakdown, failures = {}, []
        for name in self.weights:
            breakdown[name], failed = call.scores(name, self.rewards[name], images, prompts, self.settings.timeout)
            failures += failed
        return self.batch(breakdown, failures)

    def batch(self, breakdown: dict[str, list[float | None]], failures: list[str]) -> RewardBatch:
        """What `__call__` returns, of images that were scored one by one elsewhere."""
        total: list[float | None] = [0.0] * len(next(iter(breakdown.values())))
        for name, weight in self.weights.items():
            for row, value in enumerate(breakdown[name]):
                so_far = total[row]
                total[row] = None if so_far is None or value is None else so_far + weight * value
        return RewardBatch(total=total, breakdown=breakdown, failures=failures)

    def require(self, batch: RewardBatch) -> None:
        """Raises RewardError where more images of a step could not be scored than reward.max_failed allows, or all."""
        images, failed = len(batch.total), len(batch.total) - len(batch.scored)
        if failed and (failed > self.settings.max_failed * images or failed == images):
            raise RewardError(
                f"{failed} of {images} images could not be scored, more than reward.max_failed={self.settings.max_failed:g} of "
                f"them; the first: {batch.failures[0]}. Nothing was learned from this step"
            )

    def compared(self, batch: RewardBatch, group_ids: Sequence[str]) -> list[float]:
        """What advantages are taken from, for the scored images of a batch: the sum, or with reward.normalise=group the sum of
        every reward's distance to its group's mean in standard deviations (of the population, plus 1e-4).

        Each reward counts by its weight then, however large its numbers are (GDPO, arXiv 2601.05242; MixGRPO 2507.21802).

        Args:
            group_ids: one for each scored image.
        """
        scores = batch.of(batch.scored)
        if self.settings.normalise is RewardNormalise.none:
            return scores.total
        normalised = {name: in_group(values, group_ids) for name, values in scores.breakdown.items()}
        return [sum(w * normalised[name][row] for name, w in self.weights.items()) for row in range(len(group_ids))]

    def evaluate(
        self, images: Sequence[np.ndarray], prompts: Sequence[Prompt], batch: RewardBatch
    ) -> tuple[dict[str, float], list[str]]:
        """The evaluation metrics of all rewards, side by side, and a sentence for everything that could not be measured.

        `untrained` is the weighted sum of the rewards that nothing is trained on; `failed` counts the sentences, where there
        are any. A reward that could score no image has no metric.

        Args:
            batch: what `__call__` gave for these images; nothing is scored a second time.
        """
        metrics: dict[str, float] = {}
        failures = list(batch.failures)
        for name, reward in self.rewards.items():
            if (evaluate := getattr(reward, "evaluate", None)) is not None:
                try:
                    metrics |= call.within(self.settings.timeout, evaluate, list(images), *texts_and_columns(prompts))
                    continue
                except Exception as error:
                    failures.append(f"{name}: its own evaluation: {call.reason(error)}")
            values = batch.breakdown.get(name)
            if values is None:
                values, failed = call.scores(name, reward, images, prompts, self.settings.timeout)
                failures += failed
            if good := [value for value in values if value is not None]:
                metrics[name] = fmean(good)
        if self.untrained and set(self.untrained) <= set(metrics):
            metrics["untrained"] = sum(weight * metrics[name] for name, weight in self.untrained.items())
        return {**metrics, "failed": float(len(failures))} if failures else metrics, failures


def in_group(values: Sequence[float], group_ids: Sequence[str]) -> list[float]:
    """(value - its group's mean) / (its group's standard deviation + 1e-4); 0 where all of a group are equal."""
    members: dict[str, list[float]] = {}
    for value, group in zip(values, group_ids, strict=True):
        members.setdefault(group, []).append(value)
    flat = {group: min(own) == max(own) for group, own in members.items()}
    scale = {group: (fmean(own), pstdev(own) + STD_EPS) for group, own in members.items()}
    return [
        0.0 if flat[group] else (value - scale[group][0]) / scale[group][1]
        for value, group in zip(values, group_ids, strict=True)
    ]
