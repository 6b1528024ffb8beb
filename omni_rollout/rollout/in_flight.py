"""`rollout.max_num_seqs=auto`: how many requests this machine denoises together fastest, measured as the engine starts.

What is measured is the run's own sampling, of few steps. The bits of an image do not depend on the number that is found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer
from vllm_omni.platforms import current_omni_platform

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import RolloutRequest

MOST = 64  # what an engine with `auto` is made for
STEPS = 3
GAIN = 1.05  # more in flight must be worth this much: each of them has latents and embeddings in memory
ROOM = 0.8  # share of the free memory that the next number may be expected to take
TRIES = 2  # of each number; the faster one counts


def calibrate(engine: RolloutEngine, config: TrainConfig) -> dict[int, float]:
    """Sets the engine's `max_num_seqs`; returns images a second by how many were in flight."""
    request, base = _request(engine, config), _held()
    _seconds(engine, request, 1)  # not counted: the first pass prepares what later ones find

    def measure(number: int) -> float:
        return number / min(_seconds(engine, request, number) for _ in range(TRIES))

    def fits(number: int) -> bool:
        """Twice what the number before, half of this, has added."""
        return 2 * (_held() - base) < ROOM * current_omni_platform.get_free_memory()

    found = climb(measure, fits)
    engine.max_num_seqs = best(found)
    return found


def climb(measure: Callable[[int], float], fits: Callable[[int], bool]) -> dict[int, float]:
    """`measure` of 1, 2, 4, ... up to MOST, for as long as two in a row are not without a gain, and the next one fits."""
    found: dict[int, float] = {}
    number = 1
    while number <= MOST and (number == 1 or fits(number)):
        found[number] = measure(number)
        if number >= 4 and max(found[number], found[number // 2]) < GAIN * max(found[n] for n in found if n < number // 2):
            break
        number *= 2
    return found


def best(found: Mapping[int, float]) -> int:
    """The fewest that are as fast as any, to within GAIN."""
    return min(number for number, speed in found.items() if GAIN * speed >= max(found.values()))


def told(found: Mapping[int, float]) -> str:
    """In a line."""
    speeds = ", ".join(f"{number}: {speed:.3g}" for number, speed in found.items())
    return f"in flight: {best(found)} (rollout.max_num_seqs=auto measured, in images a second of {STEPS} steps, {speeds})"


def _request(engine: RolloutEngine, config: TrainConfig) -> RolloutRequest:
    """One of the run's size, width and guidance."""
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    prompt, _ = engine.pipeline.warm_up(64, 64)  # with blank pictures where the family wants some
    spec = collator.spec({"sde_type": "ode", "num_inference_steps": STEPS}, images=prompt.images)
    return collator.request(prompt, spec, "calibration", 0)


def _seconds(engine: RolloutEngine, request: RolloutRequest, number: int) -> float:
    engine.max_num_seqs = number
    asked = [replace(request, request_id=f"calibration-{member}", member=member) for member in range(number)]
    start = time.perf_counter()
    for _ in engine.generate(asked):
        pass
    return time.perf_counter() - start


def _held() -> int:
    """Bytes, at most since the process started."""
    platform: Any = current_omni_platform
    return platform.max_memory_reserved()
