"""What is simulated: requests, engines, and the linear model of an engine, fitted to measurements."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.simulation.cluster import Cluster, Engine, Simulation, ideal_seconds, tokens
from benchmarks.simulation.measure import ENGINE_CASES
from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec

MEASURED: dict[str, float] = json.loads((Path(__file__).parent / "measured.json").read_text())["engine"]
FITTED_TO = ("1 at a time, 10 steps", "16 at a time, 10 steps", "16 at a time, 20 steps")

# experiment=qwen_image_ocr: 512 px, 10 steps, guided
QWEN = SamplingSpec(
    height=512,
    width=512,
    num_inference_steps=10,
    true_cfg_scale=4.0,
    negative_prompt=" ",
    noise_level=1.2,
    sde_type="sde",
    log_prob_form="gaussian",
    step_indices=(0, 1),
    prompt_width=256,
    negative_prompt_width=256,
)
# Assumed, for an accelerator of 400 TFLOP/s as used: 2 * 10e9 operations a token (each token passes one of two streams).
QWEN_ENGINE = Engine(step=0.02, token=5e-5, image=0.3, max_num_seqs=8)
NANO = replace(QWEN, height=64, width=64, negative_prompt=None, prompt_width=24)


def requests(specs: Sequence[SamplingSpec]) -> list[RolloutRequest]:
    prompt = Prompt(text="a cat")
    return [
        RolloutRequest(request_id=f"{i:06d}", prompt=prompt, spec=spec, seed=i, group_id=str(i // 16), member=i % 16)
        for i, spec in enumerate(specs)
    ]


def uniform(count: int) -> list[RolloutRequest]:
    return requests([QWEN] * count)


def mixed(count: int) -> list[RolloutRequest]:
    """Half at 512 px, the rest at 768 and 1024; 10, 20 or 40 steps."""
    chance = random.Random(0)
    specs = []
    for _ in range(count):
        size = chance.choice([512, 512, 768, 1024])
        specs.append(replace(QWEN, height=size, width=size, num_inference_steps=chance.choice([10, 20, 40])))
    return requests(specs)


def fitted_engine() -> Engine:
    """The nano model's, on one processor core, from three measurements of 16 images each."""
    one, sixteen, longer = (MEASURED[name] for name in FITTED_TO)
    step = (one - sixteen) / 150  # 160 steps of one image against 10 of sixteen
    image_step = (longer - sixteen - 10 * step) / 160
    token = image_step / tokens(requests([NANO])[0])
    return Engine(step=step, token=token, image=(2 * sixteen - longer) / 16, max_num_seqs=1)


def predicted(case: str) -> float:
    """Seconds of one of ENGINE_CASES: the calls follow each other, each with all its requests at once."""
    max_num_seqs, steps, at_once = ENGINE_CASES[case]
    engine = replace(fitted_engine(), max_num_seqs=max_num_seqs)
    seconds = 0.0
    for start in range(0, len(steps), at_once):
        call = requests([replace(NANO, num_inference_steps=count) for count in steps[start : start + at_once]])
        seconds += Simulation(Cluster(workers=1, engine=replace(engine, takes_while_running=True)), call, 0).run().seconds
    return seconds


__all__ = ["FITTED_TO", "MEASURED", "QWEN_ENGINE", "fitted_engine", "ideal_seconds", "mixed", "predicted", "uniform"]
