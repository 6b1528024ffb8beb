"""What came of each fault, in figures, and whether the run's promises hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.faults.scene import PER_STEP, STEPS, Scene
from benchmarks.faults.witness import counted_twice_or_not, differences, mixed_policies

HEAD = (
    "fault | back end | what, and when | finished by then | of these kept | sampled again, unfinished | steps repeated "
    "| next progress after, s | next step after, s | equal to undisturbed | each counted once | one policy each | as promised"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Each of the last four lists what contradicts it, so empty is good; the rows of one run share the first three."""

    fault: str
    backend: str
    what: str
    finished: int  # trajectories, since the start of the run
    kept: int  # of these, not sampled again
    unfinished: int  # under way or waiting, sampled afterwards
    repeated: int  # steps whose line of metrics had been written
    recovery: float  # seconds to the next finished trajectory or step
    step: float  # seconds to the end of the next step
    differences: list[str]
    compared: str  # how much of the run
    not_once: list[str]
    mixed: list[str]
    broken: list[str]

    @property
    def good(self) -> bool:
        lost = self.finished - self.kept
        return lost <= PER_STEP * self.repeated and not any((self.differences, self.not_once, self.mixed, self.broken))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "good": self.good}

    def as_markdown(self) -> str:
        verdicts = [
            f"NO: {'; '.join(found[:3])}" if found else good
            for found, good in (
                (self.differences, self.compared),
                (self.not_once, "yes"),
                (self.mixed, "yes"),
                (self.broken, "yes"),
            )
        ]
        numbers = [self.finished, self.kept, self.unfinished, self.repeated, f"{self.recovery:.1f}", f"{self.step:.1f}"]
        return " | ".join(map(str, [self.fault, self.backend, self.what, *numbers, *verdicts]))


def rows_of(scene: Scene, reference: Scene, *, same: int | None = None) -> list[Row]:
    """A row for each strike of a scene that has ended; none of one that failed before its first.

    Args:
        same: steps that must be those of the reference, where the fault changes later ones; None: all.
    """
    steps = STEPS[scene.backend]
    different = differences(scene.run_dir, scene.witness, reference.run_dir, reference.witness, same)
    once = counted_twice_or_not(scene.run_dir, steps, PER_STEP)
    mixed = list(mixed_policies(scene.run_dir, scene.witness))
    ends = [strike.time for strike in scene.strikes[1:]] + [float("inf")]
    rows = []
    for strike, end in zip(scene.strikes, ends, strict=False):
        before = {one.request_id for one in scene.witness.finished if one.time <= strike.time}
        of_done_steps = {one for one in before if int(one.partition("-")[0]) <= strike.logged}
        finished = strike.logged * PER_STEP + len(before - of_done_steps)
        after = [one for one in scene.witness.finished if strike.time < one.time <= end]
        lost = {one.request_id for one in after if one.request_id in before or one.step <= strike.logged}
        lines = [(when, step) for when, step in scene.witness.steps if strike.time < when <= end]
        step = min((when for when, _ in lines), default=float("nan"))
        rows.append(
            Row(
                fault=strike.fault,
                backend=scene.backend,
                what=strike.what,
                finished=finished,
                kept=finished - len(lost),
                unfinished=strike.unfinished,
                repeated=len([step for _, step in lines if step <= strike.logged]),
                recovery=min([step, *(one.time for one in after)]) - strike.time,
                step=step - strike.time,
                differences=different,
                compared="yes" if same is None else f"yes, the {same} before it",
                not_once=once,
                mixed=mixed,
                broken=strike.broken,
            )
        )
    return rows
