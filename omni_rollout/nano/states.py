"""The states of a transformer in training, one kept at every evaluation, and which of them to ship."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_rollout.nano.transformer import TrainingSettings

logger = logging.getLogger(__name__)

EVALUATION_SEED, SECOND_LOOK_SEED, REPORT_SEED = 123, 999, 2026
"""Noise of the three measurements a shipped state goes through, kept apart so that none repeats another's luck."""

EXACT_MATCH = "exact_match"


def state_name(step: int) -> str:
    return f"step_{step:05d}"


def inside_twice(evaluation: Mapping[str, Any], window: tuple[float, float], measure: str = EXACT_MATCH) -> bool:
    """Whether a state read inside the window at its evaluation and again at its second look.

    One look at 120 images is off by 5 points either way, and the first of many looks to exceed a bound exceeds it by
    luck; so the second look takes more images and other noise.
    """
    low, high = window
    looks = (evaluation[measure], evaluation.get("second_look", {}).get(measure, -1.0))
    return all(low <= look <= high for look in looks)


def choose_state(evaluations: Sequence[Mapping[str, Any]], window: tuple[float, float], measure: str = EXACT_MATCH) -> int:
    """The first step that reads inside the window twice; failing that, with a warning, the step closest to its middle."""
    for evaluation in evaluations:
        if inside_twice(evaluation, window, measure):
            return evaluation["step"]
    middle = sum(window) / 2
    closest = min(evaluations, key=lambda evaluation: abs(evaluation[measure] - middle))
    logger.warning("no state reads inside %s twice; shipping step %d, the closest", window, closest["step"])
    return closest["step"]


class States:
    """Keeps the averaged weights at every evaluation in `folder`, and what was measured of them in `evaluations`."""

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        look: Callable[[Any, int, int], dict[str, Any]],
        measure: str = EXACT_MATCH,
    ) -> None:
        """`measure`: the entry of what `look` returns that counts.

        Args:
            look: `look(transformer, images, seed)` measures so many images of held-out numbers.
        """
        self.folder, self.settings, self.look, self.measure = folder, settings, look, measure
        self.evaluations: list[dict[str, Any]] = []

    def keep(self, step: int, averaged: Any) -> bool:
        """Whether the state to ship is there, or lies behind."""
        settings, (low, high) = self.settings, self.settings.window
        averaged.save_pretrained(self.folder / state_name(step))
        evaluation = {"step": step, **self.look(averaged, settings.evaluation_images, EVALUATION_SEED)}
        if low <= evaluation[self.measure] <= high:
            evaluation["second_look"] = self.look(averaged, settings.second_look_images, SECOND_LOOK_SEED)
        logger.info("state %d: %s", step, evaluation)
        self.evaluations.append(evaluation)
        return evaluation[self.measure] > high or inside_twice(evaluation, settings.window, self.measure)
