"""What `/v1/rollouts` answers with: frames, each a line of JSON and as many bytes after it as its `bytes` says.

`accepted` (the requests as resolved), then `trajectory` or `error` for each of them as it finishes, `alive` while nothing does,
and `end`: an answer without it was cut off. A trajectory is a capsule, in the frame or, where `shared` names it, in the memory
that both sides share; there `end` waits until the client has removed its name.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from omni_rollout.models.base.images import read_image
from omni_rollout.types import RolloutRequest, Trajectory

FRAMES = "application/vnd.omni-rollout.frames"
WEIGHTS = "application/vnd.omni-rollout.safetensors"
SHARED_TOKEN = "x-shared-memory"  # header: what the client has read in the server's folder of shared memory
SHARED_FROM = "x-shared-memory-from"  # header: bytes of a trajectory from which on it is put there; without it, all are
SHARED_BYTES = 4 << 20  # what a client asks for: a smaller trajectory is sooner sent over the socket than put there and mapped
SHARED_NAME = "x-shared-memory-name"  # header: the file there that stands for the body
ALIVE_SECONDS = 5.0  # between frames
Frame = tuple[dict[str, Any], bytes]


class CutOffError(ConnectionError):
    """An answer that ended before its last frame."""


def sharing(token: str, key: str, value: object) -> dict[str, str]:
    """Headers of a client that has read the server's token."""
    return {SHARED_TOKEN: token, key: str(value)}


def frame(head: Mapping[str, Any], content: bytes = b"") -> list[bytes]:
    return [json.dumps({**head, "bytes": len(content)}).encode() + b"\n", content]


def frames(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """The frames up to `end`, which is left out.

    Args:
        chunks: of the body, cut anywhere.

    Raises:
        CutOffError: there is no `end`.
    """
    rest, buffer = iter(chunks), bytearray()

    def more() -> None:
        chunk = next(rest, None)
        if chunk is None:
            raise CutOffError("the server's answer ended before its last frame")
        buffer.extend(chunk)

    while True:
        while (end := buffer.find(b"\n")) < 0:
            more()
        head = json.loads(buffer[:end])
        del buffer[: end + 1]
        while len(buffer) < head["bytes"]:
            more()
        content = bytes(memoryview(buffer)[: head["bytes"]])
        del buffer[: head["bytes"]]
        if head["type"] == "end":
            return
        yield head, content


def echo(request: RolloutRequest) -> dict[str, Any]:
    """A request as it was understood."""
    return {"request_id": request.request_id, **echo_of(request)}


def echo_of(one: RolloutRequest | Trajectory) -> dict[str, Any]:
    return {"seed": one.seed, "group_id": one.group_id, "member": one.member, "spec": one.spec.to_json()}


def to_body(requests: Sequence[RolloutRequest], weights: str | None = None) -> dict[str, Any]:
    """Of `POST /v1/rollouts`. Pictures travel once, however many requests speak of them; metadata of prompts stay here."""
    pictures = {image.sha256: image for request in requests for image in request.prompt.images}
    return {
        "requests": [
            {
                "prompt": request.prompt.text,
                "images": [f"sha256:{image.sha256}" for image in request.prompt.images],
                "sampling": parameters(request),
                "seed": request.seed,
                "group_id": request.group_id,
                "member": request.member,
            }
            for request in requests
        ],
        "images": [b64encode(read_image(image)).decode() for image in pictures.values()],
        "weights": weights,
    }


def parameters(request: RolloutRequest) -> dict[str, Any]:
    """All of the spec; resolved again, they are the same spec."""
    values = request.spec.to_json()
    del values["family"]  # the server's own
    return {**values, "step_indices": list(request.spec.step_indices) or None}
