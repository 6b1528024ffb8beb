"""`omni-rollout plan`: which split of the GPUs fits, why, and what would make one fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from itertools import combinations
from pathlib import Path
from typing import Any

from omni_rollout.config import AUTO, Backend, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.outputs import file_problem
from omni_rollout.launch.validate import trainer_engine, validate_plan
from omni_rollout.models import family_module
from omni_rollout.models.base.sizes import Sizes
from omni_rollout.plan.parts import total
from omni_rollout.plan.report import show
from omni_rollout.plan.split import Gpus, Plan, make_plan, make_run

MOST_CHANGES, SHOWN = 4, 4

CHANGES = (  # what may be tried where nothing fits
    "rollout.offload=encoders",
    "trainer.gradient_checkpointing=true",
    "trainer.micro_batch_size=1",
    "trainer.engine=fsdp2",
    "trainer.engine=fsdp2 trainer.reduce=backward",
    "trainer.engine=deepspeed trainer.zero_stage=2",
    "trainer.engine=deepspeed trainer.zero_stage=3",
    "trainer.offload=optimizer",
    "trainer.offload=all",
    "trainer.lora_rank=64",
    "trainer.ema_decay=0",
    "algorithm.kl_coef=0",
    "sampling.true_cfg_scale=1",
    "model.dtype=bfloat16",
    "rollout.max_num_seqs=1",
)


def changed(config: TrainConfig, text: str) -> TrainConfig:
    """With `section.key=value ...` as on the command line, of values that need no Hydra."""
    for key, _, value in (word.partition("=") for word in text.split()):
        section, name = key.split(".")
        before = getattr(config, section)
        now = {name: _typed(value, getattr(before, name))}
        config = replace(config, **{section: replace(before, **now)})
    return config


def _typed(value: str, before: Any) -> Any:
    if isinstance(before, Enum):
        return type(before)[value]
    return value == "true" if isinstance(before, bool) else float(value) if isinstance(before, float) else int(value)


def possible(config: TrainConfig, chosen: Sequence[str], ranks: int) -> TrainConfig | None:
    """With all of these changes; None: one of them changes nothing, two are of one key, or `train` would refuse them."""
    keys = [word.partition("=")[0] for text in chosen for word in text.split()]
    if len(set(keys)) < len(keys):
        return None
    steps = [config]
    for text in chosen:
        steps.append(changed(steps[-1], text))
    idle = any(one == before for one, before in zip(steps[1:], steps, strict=False))
    probe = replace(steps[-1].trainer, ranks=ranks)
    return None if idle or any(trainer_engine(probe)) else steps[-1]


def closest(config: TrainConfig, sizes: Sizes, gpus: Gpus) -> list[tuple[str, Plan]]:
    """The fewest changes with which the run fits, each way with its plan; fewest ranks first. Empty: none was found."""
    ranks = max(gpus.count - 1, 1)
    for number in range(1, MOST_CHANGES + 1):
        ways = ((" ".join(chosen), possible(config, chosen, ranks)) for chosen in combinations(CHANGES, number))
        plans = ((text, make_plan(make_run(way, sizes), gpus)) for text, way in ways if way is not None)
        found = [(text, plan) for text, plan in plans if plan.fits]
        if found:
            return sorted(
                found, key=lambda one: (one[1].ranks, one[1].rank_bytes if gpus.count > 1 else one[1].together_bytes)
            )[:SHOWN]
    return []


def plan(overrides: Sequence[str], *, json_path: Path | None = None) -> int:
    """Prints the plan of a run; returns 0 if it fits, 1 if not.

    Args:
        overrides: `gpus=...`, and what `train` would be given. `trainer.ranks` is chosen where it is not given.

    Raises:
        UserError: gpus missing or wrong, a configuration that `train` would refuse, a file that cannot be written.
    """
    given = [word.removeprefix("gpus=") for word in overrides if word.startswith("gpus=")]
    if len(given) != 1:
        raise UserError("gpus has no value: give gpus=8x80, once" if not given else f"gpus is given as {given}: expected one")
    gpus = Gpus.parse(given[0])
    config = compose([word for word in overrides if not word.startswith("gpus=")], unused=["prompts"])
    if config.trainer.fit == AUTO:
        raise UserError(
            "trainer.fit=auto: of train, not of plan; "
            "`omni-rollout train ... trainer.fit=auto dry_run=true gpus=8x80` says what it would set"
        )
    fixed = any(word.startswith("trainer.ranks=") for word in overrides)
    ranks = config.trainer.ranks if fixed else max(gpus.count - 1, 1)
    backend = Backend.embedded if gpus.count == 1 else Backend.verl
    validate_plan(replace(config, backend=backend, trainer=replace(config.trainer, ranks=ranks)))
    if json_path is not None and (problem := file_problem(json_path)) is not None:
        raise UserError(f"--json {json_path}: {problem}")

    sizes = family_module(config.model.family, "sizes").read_sizes(config.model.path)
    made = make_plan(make_run(config, sizes), gpus, ranks if fixed else None)
    better = [] if made.fits else closest(config, sizes, gpus)
    show(config, made, better)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(as_json(made, better), indent=2) + "\n", encoding="utf-8")
    return 0 if made.fits else 1


def as_json(made: Plan, better: Sequence[tuple[str, Plan]]) -> dict[str, Any]:
    return {
        **asdict(made),
        "fits": made.fits,
        "fits_together": made.fits_together,
        "rank_bytes": made.rank_bytes,
        "together_bytes": made.together_bytes,
        "engine_bytes": total(made.engine),
        "changes": [
            {"overrides": text, "ranks": one.ranks, "engines": one.engines, "rank_bytes": one.rank_bytes}
            for text, one in better
        ],
    }
