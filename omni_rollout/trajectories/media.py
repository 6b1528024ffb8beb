"""What a trajectory made, as files that people open."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from omni_rollout.trajectories.capsule import write_whole
from omni_rollout.types import Trajectory

FRAME_MS = 1000 // 16  # of a video; both Wan2.2 models make 16 frames a second


def save_media(trajectory: Trajectory, stem: str | Path) -> list[Path]:
    """An image as `stem`.png, layers as `stem`.N.png with their alpha, a video as an animated, lossless `stem`.webp.

    Each file appears whole or not at all; returns them.
    """
    stem = Path(stem)
    if trajectory.kind == "video":
        contents = {stem.with_name(f"{stem.name}.webp"): animated(trajectory.media, "WEBP", lossless=True)}
    else:
        made = [Image.fromarray(array) for array in pictures(trajectory)]
        numbers = [""] if trajectory.kind == "image" else [f".{number}" for number in range(len(made))]
        contents = {}
        for number, picture in zip(numbers, made, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            contents[stem.with_name(f"{stem.name}{number}.png")] = buffer.getvalue()
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents)


def animated(video: np.ndarray, file_format: Literal["WEBP", "GIF"], **options: bool) -> bytes:
    """[F, H, W, 3] uint8 as a file that plays for ever."""
    first, *rest = [Image.fromarray(frame) for frame in video]
    buffer = io.BytesIO()
    first.save(buffer, format=file_format, save_all=True, append_images=rest, duration=FRAME_MS, loop=0, **options)
    return buffer.getvalue()


def pictures(trajectory: Trajectory) -> list:
    return [trajectory.media] if trajectory.kind == "image" else list(trajectory.media)
