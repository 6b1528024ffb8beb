"""What `omni-rollout plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from omni_rollout.config import TrainConfig
from omni_rollout.models import family_module
from omni_rollout.models.base.sampling import assumed_images
from omni_rollout.plan.parts import Part, phases, total
from omni_rollout.plan.split import Plan


def show(config: TrainConfig, made: Plan, better: Sequence[tuple[str, Plan]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    gpus, size = made.gpus, gib(made.gpus.bytes)
    console.print(f"{config.model.path} on {gpus}; figures are derived, not measured on a GPU")
    rules = family_module(config.model.family, "spec").RULES
    if images := assumed_images(rules, config.sampling.extra):
        number = f"{len(images)} input image{'' if len(images) == 1 else 's'} of {images[0].height}x{images[0].width}"
        console.print(f"assumed: {number} a prompt; others: sampling.height, sampling.width and sampling.extra")
    if gpus.count == 1:
        console.print(f"one process, backend=embedded: {gib(made.together_bytes)} of {size}: {_verdict(made.fits)}")
        console.print(_table("an engine and a trainer in one process", made.together, in_turns=True))
    else:
        where = f"trainer.ranks={made.ranks} rollout.workers={made.engines}"
        rank, engine = gib(made.rank_bytes), gib(total(made.engine))
        console.print(f"apart ({where}): rank {rank}, engine {engine} of {size}: {_verdict(made.fits_apart)}")
        together = f"{gib(made.together_bytes)} of {size}: {_verdict(made.fits_together)}"
        console.print(f"colocated (rollout.placement=colocated trainer.ranks={gpus.count}): {together}")
        if made.fits_together and not made.fits_apart:
            title = f"an engine and one of {gpus.count} ranks in one process"
            console.print(_table(title, made.together, in_turns=True))
        console.print(_table(f"a trainer rank (of {made.ranks}, trainer.engine={config.trainer.engine.value})", made.rank))
        if total(made.start) > total(made.rank):
            console.print(_table("a trainer rank as it starts, which is more", made.start))
        console.print(_table("a rollout engine", made.engine))
        console.print(_table("memory of a node, at most", made.hosts))
    if not made.fits:
        console.print("closest that fit:" if better else f"no change that is known here makes it fit {gpus}")
    for text, one in better:
        apart = f"ranks {one.ranks}, engines {one.engines}; rank {gib(one.rank_bytes)}"
        together = gib(one.together_bytes) + ("" if gpus.count == 1 else ", a rank and an engine in one process on every GPU")
        console.print(f"  {text}: {apart if one.fits_apart else together}")


def _table(title: str, parts: Sequence[Part], *, in_turns: bool = False) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / 2**30:.2f}", part.why)
    if not in_turns:
        table.add_row("sum", f"{total(parts) / 2**30:.2f}", "", style="bold")
    else:
        for when, needed in phases(parts).items():
            table.add_row(f"in {when.value}", f"{needed / 2**30:.2f}", "", style="bold")
    return table


def gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


def _verdict(fits: bool) -> str:
    return "fits" if fits else "does not fit"
