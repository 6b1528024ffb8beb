"""Input images that come as bytes: checked before they are unpacked, and kept in a folder of the server's own."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from omni_rollout.models.base.images import describe, picture_problem
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.types import InputImage


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
        if (problem := picture_problem(content, self._max_pixels)) is not None:
            raise BadRequest(f"{param}: {problem}", param)
