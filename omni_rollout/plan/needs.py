"""The memory of one process or of the GPUs that a dry run names, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from omni_rollout.config import Backend, Placement, TrainConfig
from omni_rollout.models import family_module
from omni_rollout.plan.memory import engine_parts, process_parts, rank_parts, start_parts
from omni_rollout.plan.parts import total
from omni_rollout.plan.report import gib
from omni_rollout.plan.split import Gpus, make_plan, make_run


def needs(config: TrainConfig, gpus: str | None) -> tuple[bool, Iterator[str]]:
    """Whether the run fits, as far as that is asked, and what to say of its memory.

    Args:
        gpus: such as 8x80; None: no question of fitting.

    Raises:
        UserError: gpus that say nothing.
    """
    run = make_run(config, family_module(config.model.family, "sizes").read_sizes(config.model.path))
    ranks = config.trainer.ranks
    rank = max(total(rank_parts(run, ranks)), total(start_parts(run)))
    engine = total(engine_parts(run))
    told = f"a trainer rank {gib(rank)}, a rollout engine {gib(engine)}"
    process = total(process_parts(run))
    if gpus is None:
        together = f", {gib(process)} in one process" if config.backend is Backend.embedded else ""
        return True, iter([f"memory      {told}{together} (derived, not measured); gpus=8x80 says whether it fits"])
    place = Gpus.parse(gpus)
    if config.backend is Backend.embedded:
        fits = process <= place.bytes
        where = f"{gib(process)} in one process, backend=embedded, on one GPU of {place.gib} GiB"
    elif config.rollout.placement is Placement.colocated:
        each = total(process_parts(run, ranks))
        fits = ranks <= place.count and each <= place.bytes
        where = f"{gib(each)} in each of {ranks} processes, rollout.placement=colocated, on {place}"
    else:
        apart = ranks + config.engines <= place.count
        fits = apart and make_plan(run, place, ranks).fits_apart
        where = f"{ranks} ranks and {config.engines} engines on {place}"
    verdict = "fits" if fits else f"does not fit; omni-rollout plan ... gpus={gpus} says what would"
    return fits, iter([f"memory      {told}; {where}: {verdict} (derived, not measured)"])
