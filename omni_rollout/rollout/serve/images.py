"""Input images that come as bytes: checked before they are unpacked, and kept in a folder of the server's own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from PIL import Image

from omni_rollout.models.base.images import describe
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.types import InputImage

FORMATS = ("PNG", "JPEG", "WEBP")


def image_bytes(text: str, param: str) -> bytes:
    """Of base64, or of a `data:` address with base64; no other address is opened."""
    head, comma, encoded = text.partition(",") if text.startswith("data:") else ("data:;base64", ",", text)
    if not comma or not head.endswith(";base64"):
        raise BadRequest(f"{param}: expected data:image/png;base64,...", param)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{param}: {text[:60]!r} is not base64; no address and no path is opened here", param) from None


class ImageFolder:
    """Input images by their sha256, each for as long as a request needs it."""

    def __init__(self, max_pixels: int) -> None:
        self._folder = TemporaryDirectory(prefix="omni_rollout-images-")
        self._max_pixels = max_pixels
        self._users: Counter[str] = Counter()
        self._lock = Lock()  # bodies are read in several threads

    def __len__(self) -> int:
        return len(self._users)

    def keep(self, content: bytes, param: str) -> InputImage:
        """Raises BadRequest: no PNG, JPEG or WebP, too large, several frames, or damaged."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = Path(self._folder.name) / sha256
        with self._lock:
            if sha256 not in self._users:
                self._check(content, param)
                path.write_bytes(content)
            self._users[sha256] += 1
            return describe(path)

    def release(self, images: Iterable[InputImage]) -> None:
        with self._lock:
            for image in images:
                self._users[image.sha256] -= 1
                if not self._users[image.sha256]:
                    del self._users[image.sha256]
                    Path(image.path).unlink(missing_ok=True)

    def close(self) -> None:
        self._folder.cleanup()

    def _check(self, content: bytes, param: str) -> None:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > self._max_pixels:  # before anything is unpacked
                    raise BadRequest(
                        f"{param}: {width}x{height} pixels, expected at most {self._max_pixels} (serve.max_pixels)", param
                    )
                if getattr(image, "n_frames", 1) > 1:
                    raise BadRequest(f"{param}: an animation of {image.n_frames} frames, expected one picture", param)  # type: ignore[attr-defined]
                image.load()
        except BadRequest:
            raise
        except Exception as error:  # whatever a decoder makes of hostile bytes
            raise BadRequest(f"{param}: not readable as {', '.join(FORMATS)} ({str(error)[:120]})", param) from None
