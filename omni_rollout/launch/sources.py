"""What is wrong with the rewards and prompts that a configuration names, before anything of them is read."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from omni_rollout import plugins
from omni_rollout.config import Backend, TrainConfig
from omni_rollout.models import family_module

PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def reward_problems(config: TrainConfig) -> Iterator[str]:
    weights, sources, untrained = config.reward.weights, config.reward.source, config.evaluation.reward.weights
    known = sorted({*plugins.registered("rewards"), *sources})
    given = [("reward.weights", item) for item in weights.items()]
    given += [("evaluation.reward.weights", item) for item in untrained.items()]
    for key, (name, weight) in given:
        for problem in unknown(key, name, known):
            yield f"{problem}; one of your own needs its function too: reward.source.{name}=path/to/file.py:FUNCTION"
        if not math.isfinite(weight):
            yield f"{key}.{name}={weight}: expected a finite number"
    for name, source in sources.items():
        if name not in weights and name not in untrained:
            yield f"reward.source.{name}={source}: nothing uses it; give reward.weights.{name}, or evaluation.reward.weights"
        elif not plugins.is_address(source) and (problem := plugins.function_problem(source)) is not None:
            yield f"reward.source.{name}={source}: {problem}, or an http(s) address"
    for name, model in config.reward.model.items():
        if name not in weights and name not in untrained:
            yield f"reward.model.{name}={model}: nothing uses it; give reward.weights.{name}, or evaluation.reward.weights"
    if not 0 <= config.reward.max_failed < 1:
        yield f"reward.max_failed={config.reward.max_failed}: expected a share, at least 0 and below 1"
    if not any(weights.values()):
        yield f"reward.weights={weights}: {'every weight is 0' if weights else 'empty'}; give one, such as reward=ocr"


def prompt_problems(config: TrainConfig) -> Iterator[str]:
    if not isinstance(config.prompts, str | dict):
        yield f"prompts={config.prompts}: expected a file, a folder or a function; of several, {{SOURCE: WEIGHT, ...}}"
        return
    given = config.prompts if isinstance(config.prompts, dict) else {config.prompts: 1.0}
    if not given:
        yield "prompts={}: no source in it; give {SOURCE: WEIGHT}, or one file"
    for source, weight in given.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            yield f"prompts: {source} has the weight {weight}; expected a number above 0"
        yield from _source("prompts", str(source))
    if config.evaluation.prompts is not None:
        yield from _source("evaluation.prompts", config.evaluation.prompts)


def target_problems(config: TrainConfig, columns: Sequence[str]) -> Iterator[str]:
    """What keeps a run from learning from images of these columns, beside what its algorithm says."""
    if not columns:
        return
    given = f"algorithm.columns=[{','.join(columns)}]"
    kind = family_module(config.model.family, "spec").KIND
    if kind != "image":
        yield f"{given}: {config.model.family} makes {kind}, and only images are read from a data set"
    if config.backend is Backend.verl:
        yield f"{given} with backend=verl: a data set's images are learned from in one process; give backend=embedded"
    sources = config.prompts if isinstance(config.prompts, dict) else [config.prompts]
    for source in map(str, sources):
        if source.endswith(".txt"):
            yield f"prompts={source}: a .txt has no columns, and {given} needs them; give a .jsonl, .parquet or dataset"


def _source(key: str, source: str) -> Iterator[str]:
    """What is wrong with one source of prompts, as far as can be said before it is read."""
    if plugins.is_function(source):
        yield from [f"{key}={source}: {problem}"] if (problem := plugins.function_problem(source)) is not None else []
    elif os.path.isdir(source):  # os.path's answers are no errors, however odd the name
        if not any(file for name in ("train*", "test*", "state.json") for file in Path(source).glob(name)):
            yield f"{key}={source}: it is a folder without train.jsonl, .parquet or .txt, and no saved dataset"
    elif not os.path.isfile(source):
        yield f"{key}={source}: no such file"
    elif Path(source).suffix not in PROMPT_SUFFIXES:
        yield f"{key}={source}: expected a file that ends in {', '.join(PROMPT_SUFFIXES)}"


def unknown(key: str, name: str, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        yield f"{key}={name}: {f'did you mean {near[0]}? ' if near else ''}expected one of {', '.join(known)}"
