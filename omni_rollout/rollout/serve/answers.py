"""Trajectories as OpenAI's image and chat answers; what was understood is beside them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from omni_rollout.rollout.serve.wire import echo_of
from omni_rollout.trajectories.media import animated, pictures
from omni_rollout.types import Trajectory


def images_answer(made: Sequence[Trajectory], file_format: str) -> dict[str, Any]:
    """One entry an image; of layers, one for each; a video as an animated, lossless WebP."""
    entries = [_entry(trajectory, *encoded) for trajectory in made for encoded in _files(trajectory, file_format)]
    spec = made[0].spec
    own_format = "webp" if made[0].kind == "video" else file_format
    return {"created": int(time.time()), "data": entries, "output_format": own_format, "size": f"{spec.width}x{spec.height}"}


def chat_answer(made: Sequence[Trajectory], model: str) -> dict[str, Any]:
    """As vllm-omni's: one message, whose content is the images."""
    files = [(trajectory, *encoded) for trajectory in made for encoded in _files(trajectory, "png")]
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}, "omni_rollout": echo_of(trajectory)}
        for trajectory, kind, text in files
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", "logprobs": None}
    return {
        "id": f"chatcmpl-{made[0].request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _entry(trajectory: Trajectory, kind: str, text: str) -> dict[str, Any]:
    return {"b64_json": text, "url": None, "revised_prompt": None, "omni_rollout": echo_of(trajectory)}


def _files(trajectory: Trajectory, file_format: str) -> list[tuple[str, str]]:
    """(format, base64) of each file."""
    if trajectory.kind == "video":
        return [("webp", _text(animated(trajectory.media, "WEBP", lossless=True)))]
    return [(file_format, _text(_file(array, file_format))) for array in pictures(trajectory)]


def _file(array: Any, file_format: str) -> bytes:
    buffer, picture = io.BytesIO(), Image.fromarray(array)
    if file_format == "jpeg":
        picture.convert("RGB").save(buffer, format="JPEG", quality=95)
    else:
        picture.save(buffer, format=file_format.upper(), **({"lossless": True} if file_format == "webp" else {}))
    return buffer.getvalue()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
