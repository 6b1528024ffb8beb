"""Images to learn from that a data set names beside its prompts: read, checked and described, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.models import family_module
from omni_rollout.models.base.images import described, picture_problem
from omni_rollout.types import InputImage


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a row must bring."""

    columns: tuple[str, ...]  # paths of images, best first
    multiple: int  # pixels of height and width, as the family takes them
    max_pixels: int

    def of(self, row: Mapping[str, Any], where: str, folder: Path) -> tuple[InputImage, ...]:
        """The images of one row, all of one size.

        Raises:
            UserError: what is wrong with which column of which row.
        """
        images = tuple(self._one(row, column, where, folder) for column in self.columns)
        sizes = {(image.height, image.width) for image in images}
        if len(sizes) > 1:
            told = ", ".join(f"{column} {_size(one)}" for column, one in zip(self.columns, images, strict=True))
            raise UserError(f"{where}: {told} pixels; expected one size, for they are compared at the same noise")
        return images

    def _one(self, row: Mapping[str, Any], column: str, where: str, folder: Path) -> InputImage:
        if column not in row:
            raise UserError(f"{where}: no `{column}` (algorithm.columns); found {', '.join(map(repr, row))[:200]}")
        path = row[column]
        if not isinstance(path, str):
            raise UserError(f"{where}: `{column}` is {type(path).__name__}, expected the path of an image file")
        file = located(path, folder)
        try:
            content = file.read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {column} {path} cannot be read ({error})") from error
        if (problem := picture_problem(content, self.max_pixels)) is not None:
            raise UserError(f"{where}: {column} {path}: {problem}")
        image = described(file, content)
        if image.height % self.multiple or image.width % self.multiple:
            raise UserError(
                f"{where}: {column} {path} has {_size(image)} pixels; the model takes multiples of {self.multiple}, and images "
                "are learned from as they are: crop or scale it"
            )
        return image


def targets_of(config: TrainConfig) -> Targets | None:
    """What the run's algorithm learns from; None: images that it samples."""
    columns = get_algorithm(config.algorithm).targets
    multiple = family_module(config.model.family, "spec").RULES.multiple
    return Targets(columns=columns, multiple=multiple, max_pixels=config.serve.max_pixels) if columns else None


def located(path: str, folder: Path) -> Path:
    """A path of a row: from the file's folder, or from `images/` in it."""
    inside = folder / "images" / path
    return inside if inside.is_file() and not (folder / path).is_file() else folder / path


def _size(image: InputImage) -> str:
    return f"{image.width}x{image.height}"
