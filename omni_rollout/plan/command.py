"""`omni-rollout plan`: which split of the GPUs fits, why, and what would make one fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omni_rollout.config import Backend, DType, Offload, TrainConfig, TrainerEngine
from omni_rollout.errors import UserError
from omni_rollout.launch import compose
from omni_rollout.models.qwen_image.sizes import Sizes, read_sizes
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.outputs import file_problem
from omni_rollout.plan.memory import Part, Run, engine_parts, host_parts, rank_parts, start_parts, total
from omni_rollout.validate import trainer_engine, validate_plan

MOST_CHANGES, SHOWN = 4, 4


@dataclass(frozen=True, kw_only=True)
class Gpus:
    nodes: int
    per_node: int
    gib: int

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """`8x80`: eight of 80 GiB on one node; `2x8x80`: on each of two nodes.

        Raises:
            UserError: anything else.
        """
        numbers = [int(word) if word.isdecimal() else 0 for word in text.split("x")]
        if len(numbers) not in (2, 3) or min(numbers) < 1:
            raise UserError(f"gpus={text}: expected GPUSxGIB such as gpus=8x80, or NODESxGPUSxGIB such as gpus=2x8x80")
        nodes, per_node, gib = numbers if len(numbers) == 3 else [1, *numbers]
        return cls(nodes=nodes, per_node=per_node, gib=gib)

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @property
    def bytes(self) -> int:
        return self.gib << 30

    def __str__(self) -> str:
        return f"{self.count} GPU{'s' if self.count > 1 else ''} of {self.gib} GiB" + (
            f" on {self.nodes} nodes" if self.nodes > 1 else ""
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration on given GPUs: `ranks` trainer ranks and `engines` rollout engines, each with a GPU of its own.

    On a single GPU they share it, as backend=embedded does.
    """

    gpus: Gpus
    ranks: int
    engines: int
    rank: list[Part]
    start: list[Part]
    engine: list[Part]
    hosts: list[Part]  # of the node with most of them
    together: list[Part]  # a rank and an engine on every GPU

    @property
    def rank_bytes(self) -> int:
        return max(total(self.rank), total(self.start))

    @property
    def fits(self) -> bool:
        if self.gpus.count == 1:
            return self.fits_together
        return self.engines > 0 and max(self.rank_bytes, total(self.engine)) <= self.gpus.bytes

    @property
    def fits_together(self) -> bool:
        return max(total(self.together), total(self.start)) <= self.gpus.bytes


def make_run(config: TrainConfig, sizes: Sizes) -> Run:
    sampling, placed = config.sampling, config.sampling.sde_window_range
    first, size = placed[0] if placed else 0, sampling.sde_window_size
    steps = None if size is None and placed is None else tuple(range(first, first + size if size else (placed or [0, 0])[1]))
    given = {
        key: getattr(sampling, key)
        for key in ("height", "width", "num_inference_steps", "true_cfg_scale", "negative_prompt", "noise_level")
    }
    widths = {"prompt_width": config.collate.prompt_width, "negative_prompt_width": config.collate.negative_prompt_width}
    spec = resolve({**given, **widths, "sde_type": sampling.sde_type.value, "step_indices": steps})
    return Run(config=config, spec=spec, sizes=sizes)


def make_plan(run: Run, gpus: Gpus, ranks: int | None = None) -> Plan:
    """With the fewest ranks that fit, the other GPUs for engines; where none fits, with as many as leave one engine.

    Args:
        ranks: if they are not to be chosen.
    """
    most = max(gpus.count - 1, 1)
    fewest = 2 if run.config.trainer.engine is TrainerEngine.fsdp2 else 1
    tried = [ranks] if ranks is not None else list(range(min(fewest, most), most + 1))
    plans = (_split(run, gpus, number) for number in tried)
    return next((plan for plan in plans if plan.rank_bytes <= gpus.bytes), _split(run, gpus, tried[-1]))


def _split(run: Run, gpus: Gpus, ranks: int) -> Plan:
    engines = max(gpus.count - ranks, 0) if gpus.count > 1 else 1
    engine = engine_parts(run)
    together = rank_parts(run, gpus.count)
    here = min(ranks, gpus.per_node)
    return Plan(
        gpus=gpus,
        ranks=ranks,
        engines=engines,
        rank=rank_parts(run, ranks),
        start=start_parts(run),
        engine=engine,
        hosts=host_parts(run, here, min(engines, max(gpus.per_node - here, 1)), ranks),
        together=[*together, *engine],
    )


Change = tuple[str, Callable[[TrainConfig], TrainConfig]]


def changes() -> list[Change]:
    """What may be tried where nothing fits: how it is written on the command line, and what it makes of a configuration."""

    def trainer(text: str, **values: Any) -> Change:
        return text, lambda config: replace(config, trainer=replace(config.trainer, **values))

    return [
        trainer("trainer.gradient_checkpointing=true", gradient_checkpointing=True),
        trainer("trainer.micro_batch_size=1", micro_batch_size=1),
        trainer("trainer.engine=fsdp2", engine=TrainerEngine.fsdp2),
        trainer("trainer.engine=deepspeed trainer.zero_stage=2", engine=TrainerEngine.deepspeed, zero_stage=2),
        trainer("trainer.engine=deepspeed trainer.zero_stage=3", engine=TrainerEngine.deepspeed, zero_stage=3),
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
            return sorted(found, key=lambda one: (one[1].ranks, one[1].rank_bytes))[:SHOWN]
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
    from omni_rollout.plan.report import show

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

    sizes = read_sizes(config.model.path)
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
        "engine_bytes": total(made.engine),
        "changes": [
            {"overrides": text, "ranks": one.ranks, "engines": one.engines, "rank_bytes": one.rank_bytes}
            for text, one in better
        ],
    }
