"""One process of `benchmarks.exact`: engine and trainer over some models, a line of JSON for each thing that was compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

MARK = "exact: "
SEED, NOISE = 11, 0.02  # of the update that both sides are given
LARGE = {"height": 512, "width": 512, "prompt_width": 256, "negative_prompt_width": 256}
SMALL = {"images": 4, "in_flight": ("1", "3", "staggered")}
WIDE = {"guidance": (4.0,), "width": ("natural", "64"), "in_flight": ("1", "3"), "images": 3}
MATRIX = {"nano": SMALL, "random16": SMALL, "wide": WIDE}  # model -> its cells
FEW = {**WIDE, "in_flight": ("3",)}
STEPS = {"nano": 3, "random16": 3, "wide": 2}


def main() -> None:
    """`[[threads, name, path, job], ...]` as JSON, then the dtypes."""
    import torch

    from omni_rollout.launch.progress import quieten_libraries

    work = [tuple(item) for item in json.loads(sys.argv[1])]
    quieten_libraries(work[0][2])
    for threads, name, path in dict.fromkeys((threads, name, path) for threads, name, path, _ in work):
        jobs = [job for *where, job in work if where == [threads, name, path]]
        for dtype in sys.argv[2:]:
            torch.set_num_threads(threads)
            for found in compared(name, path, dtype, jobs):
                print(MARK + json.dumps({"threads": threads, "model": name, "dtype": dtype, **found}), flush=True)


def compared(name: str, path: str, dtype: str, jobs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every job's result, in one engine."""
    import torch

    from omni_rollout.launch.compose import compose
    from omni_rollout.models import family_module
    from omni_rollout.parity.probe import Probe
    from omni_rollout.rollout.engine import RolloutEngine

    config = compose([f"model.path={path}", f"sampling.num_inference_steps={STEPS[name]}"], name="parity", unused=["prompts"])
    with RolloutEngine(path, dtype=dtype, max_num_seqs=8) as engine:
        policy = family_module(config.model.family, "policy").load_policy(path, getattr(torch, dtype))
        sides = Probe(engine, policy, config)
        where = {"instruction_set": engine.machine["instruction_set"], "calls": engine.machine["calls"]}
        for job in jobs:
            if job == "large":
                yield {"job": job, **where, **large(sides)}
                continue
            if job in ("update", "lora"):
                disturb(sides, job)
            yield {"job": job, **where, **cells(sides, FEW if job != "cells" else MATRIX[name])}


def cells(sides: Any, words: dict[str, Any]) -> dict[str, Any]:
    from omni_rollout.parity.matrix import Matrix
    from omni_rollout.parity.matrix import cells as cells_of

    matrix = Matrix(**words)
    results = [sides.cell(cell, matrix.images) for cell in cells_of(matrix, sides.engine.dtype)]
    measures = [result.measure for result in results if result.measure is not None]
    return {
        "cells": len(results),
        "exact": sum(result.exact for result in results),
        "log_probs": sum(found.log_probs for found in measures),
        "equal": sum(round(found.bitwise_equal_fraction * found.log_probs) for found in measures),
        "kl": max((abs(found.kl) for found in measures), default=None),
        "wrong": [f"{result.cell} {result.errors}" for result in results if not result.exact],
    }


def disturb(sides: Any, job: str) -> None:
    """Another policy on both sides: all weights, or an adapter of rank 64."""
    import torch

    from omni_rollout.diffusion.exact_ops import effective_weights
    from omni_rollout.policy.lora import attach_lora

    changed = attach_lora(sides.policy, rank=64) if job == "lora" else list(sides.policy.parameters())
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
    sides.engine.update_weights(effective_weights(sides.policy, sides.dtype), sides.engine.policy_version + 1)


def large(sides: Any) -> dict[str, Any]:
    """An image of 1024 tokens by itself, and again beside two of another size."""
    from omni_rollout.parity.matrix import Cell, renamed
    from omni_rollout.parity.measure import measure

    cell = Cell(dtype=sides.engine.dtype, guidance=4.0, width="256", in_flight="3")
    small = sides.requests(cell, 3)
    first = replace(small[0], spec=replace(small[0].spec, **LARGE, num_inference_steps=2, step_indices=(0,)))
    alone = list(sides.engine.generate([renamed(first, "alone")]))
    company = list(sides.engine.generate([renamed(first, "company"), *small[1:]]))
    together = next(t for t in company if t.spec == first.spec)
    log_probs = sides.recompute([*alone, *company])
    found = measure([*alone, *company], log_probs, 1e-4)
    same = bool((together.latents == alone[0].latents).all()) and bool((together.log_probs == alone[0].log_probs).all())
    results = [measure([t], [p], 1e-4).exact for t, p in zip([*alone, *company], log_probs, strict=True)]
    return {
        "cells": 2,
        "exact": int(results[0]) + int(all(results[1:]) and same),
        "log_probs": found.log_probs,
        "equal": round(found.bitwise_equal_fraction * found.log_probs),
        "kl": abs(found.kl),
        "wrong": [] if all(results) and same else [f"large: {results}, alone equals in company: {same}"],
    }


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
