"""What a trajectory made, as files that people open."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from omni_rollout.trajectories.capsule import write_whole
from omni_rollout.types import Trajectory

FRAME_MS = 1000 // 16  # of a video; both Wan2.2 models make 16 frames a second


def save_media(trajectory: Trajectory, stem: str | Path) -> list[Path]:
    """An image as `stem`.png, layers as `stem`.N.png with their alpha, a video as an animated, lossless `stem`.webp.

    Each file appears whole or not at all; returns them.
    """
    stem, pictures = Path(stem), [Image.fromarray(array) for array in _pictures(trajectory)]
    if trajectory.kind == "video":
        buffer = io.BytesIO()
        options = {"save_all": True, "append_images": pictures[1:], "duration": FRAME_MS, "loop": 0, "lossless": True}
        pictures[0].save(buffer, format="WEBP", **options)
        contents = {stem.with_name(f"{stem.name}.webp"): buffer.getvalue()}
    else:
        numbers = [""] if trajectory.kind == "image" else [f".{number}" for number in range(len(pictures))]
        contents = {}
        for number, picture in zip(numbers, pictures, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            contents[stem.with_name(f"{stem.name}{number}.png")] = buffer.getvalue()
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents)


def _pictures(trajectory: Trajectory) -> list:
    return [trajectory.media] if trajectory.kind == "image" else list(trajectory.media)
