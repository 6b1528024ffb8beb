"""Rewards behind an HTTP address: what goes over the wire, and the client. Nothing is unpickled on either side.

POST ADDRESS         {"id": text, "images": [...], "prompts": [text], "metadata": [object]}  ->  {"rewards": [number | null]},
                     and maybe "errors": [text | null]. An image is the base64 of a PNG; a video, or layers: a list of them.
GET ADDRESS          {"reward": text, "kinds": [text]}; optional
POST ADDRESS/check   {"prompts", "metadata"}  ->  {"problem": text | null}; optional, asked before anything is sampled

A request is sent again, with the same id, until it has an answer that makes sense: one number or null an image. A server that
remembers ids scores nothing twice, and `omni-rollout reward serve` is one.
"""

from __future__ import annotations

import base64
import io
import random
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import numpy as np
from PIL import Image

from omni_rollout.errors import UserError
from omni_rollout.rewards.base.contract import Columns, RewardError
from omni_rollout.trajectories import strict_json
from omni_rollout.types import KINDS, Kind

IMAGES_A_REQUEST = 8
REQUESTS_AT_ONCE = 4
SHARE_A_TRY = 0.2  # of the time-out: what one request may take before it is sent again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between tries, doubled from one to the next, half of it drawn at random
MARGIN = 0.9  # of the time-out: what is not scored by then is given up, and what is scored is kept


def to_wire(media: np.ndarray) -> str | list[str]:
    """uint8 [H, W, 3] -> base64 of a PNG; [F, H, W, 3] or [L, H, W, 4] -> one of each."""
    return _png(media) if media.ndim == 3 else [_png(picture) for picture in media]


def from_wire(sent: Any) -> np.ndarray:
    """Raises ValueError for what is no image."""
    if isinstance(sent, list):
        return np.stack([_pixels(picture) for picture in sent])
    return _pixels(sent)


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _pixels(sent: Any) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(sent, validate=True)), formats=["PNG"]) as image:
            pixels = np.asarray(image)
    except Exception as error:  # PIL has many, and this came from outside
        raise ValueError(f"not the base64 of a PNG ({error})") from error
    if KINDS.get((3, pixels.shape[-1])) is None and KINDS.get((4, pixels.shape[-1])) is None:
        raise ValueError(f"a PNG of shape {list(pixels.shape)}; expected RGB, or RGBA for layers")
    return pixels


class RemoteReward:
    """Batches, several under way at once; each sent again until it is answered, or the time is up.

    Args:
        key: of the configuration, for errors.
        timeout: seconds for all images of a call.

    Raises:
        UserError: nothing answers there.
    """

    def __init__(self, key: str, address: str, timeout: float) -> None:
        self._key, self._address, self._timeout = key, address.rstrip("/"), timeout
        self._a_try = max(timeout * SHARE_A_TRY, 0.05)
        self._client = httpx.Client(timeout=self._a_try, trust_env=False)
        try:
            about = self._client.get(self._address)
            told = strict_json.loads(about.text) if about.status_code == 200 else {}
        except httpx.HTTPError as error:
            raise UserError(f"{key}={address}: no answer ({error}); start it with: omni-rollout reward serve NAME") from error
        except ValueError:
            told = {}
        kinds = told.get("kinds") if isinstance(told, dict) else None
        if kinds:
            self.kinds = frozenset(cast(list[Kind], kinds))

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        try:
            answer = self._client.post(f"{self._address}/check", json=_body(prompts, metadata))
            told = strict_json.loads(answer.text) if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return  # the server knows no checks
        if isinstance(told, dict) and told.get("problem"):
            raise UserError(f"{self._key}: {told['problem']}")

    def __call__(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]
    ) -> list[float | Exception | None]:
        end = time.monotonic() + self._timeout * MARGIN
        starts = range(0, len(images), IMAGES_A_REQUEST)
        cut = [slice(start, start + IMAGES_A_REQUEST) for start in starts]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            parts = pool.map(lambda part: self._request(images[part], prompts[part], metadata[part], end), cut)
            return [value for part in parts for value in part]

    def _request(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns], end: float
    ) -> list[float | Exception | None]:
        body = {"id": uuid.uuid4().hex, "images": [to_wire(image) for image in images], **_body(prompts, metadata)}
        pause = FIRST_PAUSE
        last = "none was tried"
        while (left := end - time.monotonic()) > 0:
            try:
                answer = self._client.post(self._address, json=body, timeout=min(self._a_try, left))
                if 400 <= answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                    return [RewardError(f"{self._address} refused: {answer.status_code} {answer.text[:200]}")] * len(images)
                return _read(answer.raise_for_status().text, len(images))
            except (httpx.HTTPError, ValueError) as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(min(pause * random.uniform(0.5, 1), max(end - time.monotonic(), 0)))  # what is left is for the reason
            pause = min(2 * pause, LONGEST_PAUSE, self._a_try)
        late = f"{self._address}: no answer that makes sense within {self._timeout * MARGIN:g} s; the last: {last}"
        return [RewardError(late)] * len(images)


def _body(prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, Any]:
    return {"prompts": list(prompts), "metadata": [dict(columns) for columns in metadata]}


def _read(text: str, images: int) -> list[float | Exception | None]:
    """Raises ValueError for an answer that makes no sense, which is worth asking again."""
    answer = strict_json.loads(text)  # NaN is no JSON
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != images:
        raise ValueError(f"expected {images} rewards, got {text[:100]}")
    numbers = [type(value) in (int, float) or value is None for value in rewards]
    if not all(numbers):
        raise ValueError(f"expected numbers or null, got {rewards[numbers.index(False)]!r:.100}")
    errors = answer.get("errors")
    reasons = errors if isinstance(errors, list) and len(errors) == images else [None] * images
    return [
        RewardError(str(reason)[:300]) if value is None and reason else value
        for value, reason in zip(rewards, reasons, strict=True)
    ]
