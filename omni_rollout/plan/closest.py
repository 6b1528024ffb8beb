"""`omni-rollout plan`: which split of the GPUs fits, why, and what would make one fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omni_rollout.config import Backend, DType, Offload, Reduce, TrainConfig, TrainerEngineName
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

Change = tuple[str, Callable[[TrainConfig], TrainConfig]]


def changes() -> list[Change]:
    """What may be tried where nothing fits: how it is written on the command line, and what it makes of a configuration."""

    def trainer(text: str, **values: Any) -> Change:
        return text, lambda config: replace(config, trainer=replace(config.trainer, **values))

    return [
        trainer("trainer.gradient_checkpointing=true", gradient_checkpointing=True),
        trainer("trainer.micro_batch_size=1", micro_batch_size=1),
        trainer("trainer.engine=fsdp2", engine=TrainerEngineName.fsdp2),
        trainer("trainer.engine=fsdp2 trainer.reduce=backward", engine=TrainerEngineName.fsdp2, reduce=Reduce.backward),
        trainer("trainer.engine=deepspeed trainer.zero_stage=2", engine=TrainerEngineName.deepspeed, zero_stage=2),
        trainer("trainer.engine=deepspeed trainer.zero_stage=3", engine=TrainerEngineName.deepspeed, zero_stage=3),
        trainer("trainer.offload=optimizer", offload=Offload.optimizer),
        trainer("trainer.offload=all", offload=Offload.all),
        trainer("trainer.lora_rank=64", lora_rank=64),
        trainer("trainer.ema_decay=0", ema_decay=0.0),
        ("algorithm.kl_coef=0", lambda config: replace(config, algorithm=replace(config.algorithm, kl_coef=0.0))),
        ("sampling.true_cfg_scale=1", lambda config: replace(config, sampling=replace(config.sampling, true_cfg_scale=1.0))),
        ("model.dtype=bfloat16", lambda config: replace(config, model=replace(config.model, dtype=DType.bfloat16))),
        ("rollout.max_num_seqs=1", lambda config: replace(config, rollout=replace(config.rollout, max_num_seqs=1))),
    ]


def closest(config: TrainConfig, sizes: Sizes, gpus: Gpus) -> list[tuple[str, Plan]]:
    """The fewest changes with which the run fits, each way with its plan; fewest ranks first. Empty: none was found."""
    for number in range(1, MOST_CHANGES + 1):
        found = list(_fitting(config, sizes, gpus, number))
        if found:
            return sorted(
                found, key=lambda one: (one[1].ranks, one[1].together_bytes if gpus.count == 1 else one[1].rank_bytes)
            )[:SHOWN]
    return []


def _fitting(config: TrainConfig, sizes: Sizes, gpus: Gpus, number: int) -> Iterator[tuple[str, Plan]]:
    for chosen in combinations(changes(), number):
        changed, steps = config, []
        for _, change in chosen:
            steps.append(changed := change(changed))
        if any(one == before for one, before in zip(steps, [config, *steps], strict=False)):
            continue  # it was so before, or a later change takes it back
        probe = replace(changed.trainer, ranks=max(gpus.count - 1, 1))
        if len({text.partition("=")[0] for text, _ in chosen}) < number or any(trainer_engine(probe)):
            continue
        plan = make_plan(make_run(changed, sizes), gpus)
        if plan.fits:
            yield " ".join(text for text, _ in chosen), plan


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
    fixed = any(word.startswith("trainer.ranks=") for word in overrides)
    ranks = config.trainer.ranks if fixed else max(gpus.count - 1, 1)
    validate_plan(replace(config, backend=Backend.verl, trainer=replace(config.trainer, ranks=ranks)))
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
