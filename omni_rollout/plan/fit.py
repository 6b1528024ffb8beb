"""`trainer.fit=auto`: the machine at hand, and what must change so that a run fits it. Nothing changes what is learned."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil

from omni_rollout.config import AUTO, Backend, Placement, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import trainer_engine
from omni_rollout.models import family_module
from omni_rollout.plan.closest import possible
from omni_rollout.plan.memory import RESERVE_BYTES
from omni_rollout.plan.parts import phases, total
from omni_rollout.plan.report import gib
from omni_rollout.plan.split import Gpus, Plan, make_plan, make_run

CPU_RESERVE_BYTES = 1 << 30  # libraries and small things: 0.65 GiB were measured, see docs/planning.md
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

CHANGES = (  # the cheapest first: a later one is made only where no choice of those before it is enough
    "rollout.offload=encoders",
    "trainer.offload=optimizer",
    "trainer.offload=all",
    "trainer.gradient_checkpointing=true",
    "trainer.engine=fsdp2",
    "trainer.engine=fsdp2 trainer.reduce=backward",
    "rollout.max_num_seqs=4",
    "rollout.max_num_seqs=1",
    "trainer.micro_batch_size=4",
    "trainer.micro_batch_size=1",
)


def fitted(overrides: Sequence[str], gpus: str | None = None) -> tuple[list[str], str]:
    """`overrides` and what makes the run fit, with a line that says what was set and why.

    Args:
        overrides: of `train`; a key that is among them keeps its value.
        gpus: such as 8x80, in place of the machine at hand.

    Raises:
        UserError: nothing fits, or there is no arithmetic for it.
    """
    config, given = compose(overrides), {word.lstrip("+~").partition("=")[0] for word in overrides}
    place = _of_run(config, given, machine(config.launch.nodes) if gpus is None else Gpus.parse(gpus))
    sizes = family_module(config.model.family, "sizes").read_sizes(config.model.path)
    ranks = config.trainer.ranks if "trainer.ranks" in given else None
    reserve = CPU_RESERVE_BYTES if place.cpu else RESERVE_BYTES
    first: Plan | None = None
    least: tuple[list[str], Plan] | None = None
    for chosen, way in _ways(config, given, place):
        plan = make_plan(make_run(way, sizes, reserve=reserve), place, ranks)
        first = first or plan
        if least is None or _needed(plan) < _needed(least[1]):
            least = chosen, plan
        if place.count == 1 and plan.fits_together:
            return [*overrides, *chosen], _told(place, chosen, first, plan)
        if split := _split(way, given, plan):
            added = [*chosen, *(f"{key}={value}" for key, value in split.items() if key not in given)]
            return [*overrides, *added], _told(place, added, first, plan)
    if least is None:  # what was given cannot be had, whatever is changed beside it
        raise UserError("\n".join(trainer_engine(replace(config.trainer, ranks=place.count))))
    raise UserError(_refusal(place, *least))


def machine(nodes: int = 1) -> Gpus:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, the smallest one's memory for each; without one, this machine's memory.

    As CUDA does, it counts up to the first word that names no GPU, such as -1.

    Args:
        nodes: machines of this kind that the run has.
    """
    found = _gpus_mib()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = map(str, range(len(found))) if visible is None else (word.strip() for word in visible.split(","))
    named = takewhile(lambda word: word.startswith(("GPU-", "MIG-")) or (word.isdecimal() and int(word) < len(found)), words)
    count = min(len(list(named)), len(found))
    if count:
        return Gpus(nodes=nodes, per_node=count, gib=min(found) >> 10)
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    memory = min(psutil.virtual_memory().total, int(limit) if limit.isdecimal() else 1 << 62)
    return Gpus(nodes=1, per_node=1, gib=memory >> 30, cpu=True)


def _gpus_mib() -> list[int]:
    """Memory of each; torch would start CUDA to tell it, and what is pinned must be set before."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in done.stdout.split() if line.isdecimal()]


def _of_run(config: TrainConfig, given: set[str], place: Gpus) -> Gpus:
    """What of the machine a run may use."""
    if config.rollout.url is not None:
        raise UserError(f"trainer.fit=auto with rollout.url={config.rollout.url}: the engine is elsewhere; leave out one")
    if config.backend is Backend.verl and place.cpu:
        raise UserError("trainer.fit=auto with backend=verl: only one process is planned on a CPU; leave out one of the two")
    if config.backend is Backend.verl and place.count == 1 and config.rollout.placement is Placement.apart:
        raise UserError(
            "trainer.fit=auto with backend=verl on one GPU: an engine and a trainer rank apart need two; "
            "give backend=embedded, or rollout.placement=colocated"
        )
    in_process = config.profile or config.rollout.max_num_seqs == AUTO  # what verl does not have
    alone = config.backend is Backend.embedded and ("backend" in given or in_process)
    return replace(place, nodes=1, per_node=1) if alone else place


def _ways(config: TrainConfig, given: set[str], place: Gpus) -> Iterator[tuple[list[str], TrainConfig]]:
    """Every choice of changes that touch nothing that was given, in the order of the last change in it; first of all: none."""
    free = [text for text in CHANGES if not given & {word.partition("=")[0] for word in text.split()}]
    elsewhere = "trainer.engine" if place.count == 1 else "rollout.offload"
    free = [text for text in free if _lowers(config, text) and not text.startswith(elsewhere)]
    for mask in range(1 << len(free)):
        chosen = [text for number, text in enumerate(free) if mask >> number & 1]
        way = possible(config, chosen, place.count)  # as many ranks as there may be: colocated, one on each
        if way is not None:
            yield [word for text in chosen for word in text.split()], way


def _split(config: TrainConfig, given: set[str], plan: Plan) -> dict[str, Any]:
    """How several GPUs are shared out: apart where that fits, else a rank and an engine on each. Empty: neither fits."""
    workers, placement = config.rollout.workers or 0, config.rollout.placement
    cut = not any(trainer_engine(replace(config.trainer, ranks=plan.ranks)))  # not, where one rank has nothing to cut
    if plan.fits_apart and cut and workers <= plan.engines and placement is Placement.apart:
        return {"backend": "verl", "trainer.ranks": plan.ranks, "rollout.workers": plan.engines}
    alone = (
        plan.gpus.count > 1
        and not config.rollout.ahead
        and "rollout.workers" not in given
        and ("trainer.ranks" not in given or plan.ranks == plan.gpus.count)
    )
    if plan.fits_together and alone and (placement is Placement.colocated or "rollout.placement" not in given):
        return {"backend": "verl", "rollout.placement": "colocated", "trainer.ranks": plan.gpus.count}
    return {}


def _lowers(config: TrainConfig, text: str) -> bool:
    """Of a number: whether it is below what is asked for."""
    key, _, value = text.partition("=")
    section, name = key.split(".")
    before = getattr(getattr(config, section), name)
    return not value.isdecimal() or (isinstance(before, int) and int(value) < before)


def _needed(plan: Plan) -> int:
    """Of one GPU."""
    return plan.together_bytes if plan.gpus.count == 1 else max(plan.rank_bytes, total(plan.engine))


def _told(place: Gpus, added: Sequence[str], first: Plan, plan: Plan) -> str:
    before = _needed(first)
    now = plan.together_bytes if "rollout.placement=colocated" in added else _needed(plan)
    if not added:
        return f"fit         {place}: nothing was changed, {gib(now)} are needed (derived)"
    why = f"{gib(before)} were needed without, {gib(now)} now" if now < before else f"{gib(now)} are needed"
    return f"fit         {place}: {' '.join(added)}; {why} (derived)"


def _refusal(place: Gpus, chosen: Sequence[str], plan: Plan) -> str:
    """With the widest phase of what needs least, and its largest parts."""
    parts = plan.together if place.count == 1 else max(plan.rank, plan.engine, key=total)
    needed = phases(parts)
    widest = max(needed, key=lambda when: needed[when])
    largest = sorted((part for part in parts if widest in part.when), key=lambda part: -part.bytes)[:4]
    told = ", ".join(f"{part.name} {gib(part.bytes)}" for part in largest)
    return (
        f"trainer.fit=auto: nothing that is known here makes the run fit {place}; the least is {gib(needed[widest])} in its "
        f"{widest.value}, with {' '.join(chosen) or 'nothing changed'}, of which {told}; "
        f"omni-rollout plan ... gpus={place.text} says it line by line, "
        "and what else would have to change"
    )
