"""Input images: described where prompts are read, opened where they are encoded, and the same bytes in both places."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from omni_rollout.types import InputImage, RequestError

FORMATS = ("PNG", "JPEG", "WEBP")


def describe(path: Path) -> InputImage:
    """Raises OSError: no such file, or none that PIL can read."""
    return described(path, path.read_bytes())


def described(path: Path, content: bytes) -> InputImage:
    """`describe` of a file that holds this."""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
    return InputImage(path=str(path), sha256=hashlib.sha256(content).hexdigest(), height=height, width=width)


def picture_problem(content: bytes, max_pixels: int) -> str | None:
    """Why these bytes are no single, whole picture of `FORMATS` with at most `max_pixels` (serve.max_pixels); None: they are.

    The size is looked at before anything is unpacked.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return f"{width}x{height} pixels, expected at most {max_pixels} (serve.max_pixels)"
            if (frames := getattr(image, "n_frames", 1)) > 1:
                return f"an animation of {frames} frames, expected one picture"
            image.load()
    except Exception as error:  # whatever a decoder makes of hostile bytes
        return f"not readable as {', '.join(FORMATS)} ({str(error)[:120]})"
    return None


def read_image(image: InputImage) -> bytes:
    """Its file.

    Raises:
        RequestError: it cannot be read, or is another one than the prompt was read with.
    """
    try:
        content = Path(image.path).read_bytes()
    except OSError as error:
        raise RequestError(f"{image.path}: cannot be read as an image ({error})") from error
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise RequestError(f"{image.path}: not the file that the prompt was read with (its sha256 differs)")
    return content


def open_image(image: InputImage, mode: str = "RGB") -> Image.Image:
    """The pixels, in PIL's `mode`. Raises RequestError, as `read_image` does, or where they are no picture."""
    content = read_image(image)
    try:
        return Image.open(io.BytesIO(content)).convert(mode)
    except OSError as error:
        raise RequestError(f"{image.path}: cannot be read as an image ({error})") from error


@cache
def _scratch() -> TemporaryDirectory[str]:
    """Of this process; gone when it ends."""
    return TemporaryDirectory(prefix="omni_rollout-")


@cache
def made_image(number: int, height: int, width: int) -> InputImage:
    """A picture of its own for every number, RGBA, for those who have none at hand: warm-up, parity probe, tests."""
    rows, columns = np.indices((height, width))
    waves = [np.sin((rows * (2 + number % 3) + columns * (1 + channel)) / (5 + channel) + number) for channel in range(4)]
    pixels = np.stack(waves, axis=-1) * 100 + 128
    path = Path(_scratch().name) / f"{number}-{width}x{height}.png"
    Image.fromarray(pixels.round().astype(np.uint8)).save(path)
    return describe(path)
