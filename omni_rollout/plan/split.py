"""GPUs split between trainer ranks and rollout engines, and whether each then has the memory it needs."""

from __future__ import annotations

from dataclasses import dataclass

from omni_rollout.config import TrainConfig, TrainerEngineName
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.models.base.sampling import assumed_images
from omni_rollout.models.base.sizes import Sizes
from omni_rollout.plan.memory import RESERVE_BYTES, engine_parts, host_parts, process_parts, rank_parts, start_parts
from omni_rollout.plan.parts import Part, Run, total


@dataclass(frozen=True, kw_only=True)
class Gpus:
    nodes: int
    per_node: int
    gib: int
    cpu: bool = False  # in place of a GPU: a CPU with that much memory

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
    def text(self) -> str:
        """What `parse` reads."""
        return f"{self.nodes}x{self.per_node}x{self.gib}" if self.nodes > 1 else f"{self.per_node}x{self.gib}"

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @property
    def bytes(self) -> int:
        return self.gib << 30

    def __str__(self) -> str:
        if self.cpu:
            return f"a CPU with {self.gib} GiB"
        return f"{self.count} GPU{'s' if self.count > 1 else ''} of {self.gib} GiB" + (
            f" on {self.nodes} nodes" if self.nodes > 1 else ""
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One configuration on given GPUs: `ranks` trainer ranks and `engines` rollout engines, each with a GPU of its own.

    On a single GPU they share it, as backend=embedded does; on several, a rank and an engine may share each.
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
        return self.fits_apart or self.fits_together

    @property
    def fits_apart(self) -> bool:
        return self.gpus.count > 1 and self.engines > 0 and max(self.rank_bytes, total(self.engine)) <= self.gpus.bytes

    @property
    def together_bytes(self) -> int:
        return total(self.together)

    @property
    def fits_together(self) -> bool:
        return self.together_bytes <= self.gpus.bytes


def make_run(config: TrainConfig, sizes: Sizes, *, reserve: int = RESERVE_BYTES) -> Run:
    sampling, placed = config.sampling, config.sampling.sde_window_range
    first, size = placed[0] if placed else 0, sampling.sde_window_size
    steps = None if size is None and placed is None else tuple(range(first, first + size if size else (placed or [0, 0])[1]))
    given = {
        key: getattr(sampling, key)
        for key in ("height", "width", "num_inference_steps", "true_cfg_scale", "negative_prompt", "noise_level", "extra")
    }
    widths = {"prompt_width": config.collate.prompt_width, "negative_prompt_width": config.collate.negative_prompt_width}
    family = family_module(config.model.family, "spec")
    images = assumed_images(family.RULES, sampling.extra)
    spec = family.resolve({**given, **widths, "sde_type": sampling.sde_type.value, "step_indices": steps}, images)
    return Run(config=config, spec=spec, sizes=sizes, reserve=reserve)


def make_plan(run: Run, gpus: Gpus, ranks: int | None = None) -> Plan:
    """With the fewest ranks that fit, the other GPUs for engines; where none fits, with as many as leave one engine.

    Args:
        ranks: if they are not to be chosen.
    """
    most = max(gpus.count - 1, 1)
    fewest = 2 if run.config.trainer.engine is TrainerEngineName.fsdp2 else 1
    tried = [ranks] if ranks is not None else list(range(min(fewest, most), most + 1))
    plans = (_split(run, gpus, number) for number in tried)
    return next((plan for plan in plans if plan.rank_bytes <= gpus.bytes), _split(run, gpus, tried[-1]))


def _split(run: Run, gpus: Gpus, ranks: int) -> Plan:
    engines = max(gpus.count - ranks, 0) if gpus.count > 1 else 1
    engine = engine_parts(run)
    here = min(ranks, gpus.per_node)
    return Plan(
        gpus=gpus,
        ranks=ranks,
        engines=engines,
        rank=rank_parts(run, ranks),
        start=start_parts(run),
        engine=engine,
        hosts=host_parts(run, here, min(engines, max(gpus.per_node - here, 1)), ranks),
        together=process_parts(run, gpus.count),
    )
