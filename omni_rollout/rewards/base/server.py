"""`omni-rollout reward serve`: one reward in a process of its own, which may have an environment of its own.

What is asked twice under one id is scored once: the answer is kept, for a client whose connection broke asks again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from omni_rollout.errors import UserError
from omni_rollout.rewards.base import call
from omni_rollout.rewards.base.contract import Reward
from omni_rollout.rewards.base.http import from_wire
from omni_rollout.trajectories import strict_json
from omni_rollout.types import Prompt

ANSWERS_KEPT = 1000
LARGEST_BODY = 256 << 20  # bytes


def application(name: str, reward: Reward, timeout: float) -> Starlette:
    """The three routes of `base.http`. One batch is scored at a time: a model is no faster for two."""
    service = _Service(name, reward, timeout)
    return Starlette(
        routes=[
            Route("/", service.about, methods=["GET"]),
            Route("/", service.score, methods=["POST"]),
            Route("/check", service.check, methods=["POST"]),
        ]
    )


class _Service:
    def __init__(self, name: str, reward: Reward, timeout: float) -> None:
        self._name, self._reward, self._timeout = name, reward, timeout
        self._answers: OrderedDict[str, asyncio.Future[dict[str, Any]]] = OrderedDict()
        self._turn = asyncio.Lock()

    async def about(self, request: Request) -> JSONResponse:
        return JSONResponse({"reward": self._name, "kinds": sorted(getattr(self._reward, "kinds", ()))})

    async def check(self, request: Request) -> JSONResponse:
        try:
            body = await _body(request)
            prompts, metadata = _list(body, "prompts"), _list(body, "metadata")
        except ValueError as error:
            return _refusal(error)
        check, problem = getattr(self._reward, "check", None), None
        try:
            if check is not None:
                check(prompts, metadata)
        except UserError as error:
            problem = str(error)
        return JSONResponse({"problem": problem})

    async def score(self, request: Request) -> JSONResponse:
        try:
            body = await _body(request)
            images, prompts = _images_and_prompts(body)
        except ValueError as error:
            return _refusal(error)
        key = str(body.get("id") or id(request))
        if key not in self._answers:  # a task of its own: it goes on when the one who asked is gone
            self._answers[key] = asyncio.ensure_future(self._scored(images, prompts))
            while len(self._answers) > ANSWERS_KEPT:
                self._answers.popitem(last=False)
        return JSONResponse(await asyncio.shield(self._answers[key]))

    async def _scored(self, images: list[np.ndarray], prompts: list[Prompt]) -> dict[str, Any]:
        async with self._turn:
            values, failures = await asyncio.to_thread(call.scores, self._name, self._reward, images, prompts, self._timeout)
        reasons = iter(failures)
        return {"rewards": values, "errors": [next(reasons) if value is None else None for value in values]}


async def _body(request: Request) -> dict[str, Any]:
    """Raises ValueError: too long, or not a JSON object."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise ValueError(f"more than {LARGEST_BODY} bytes; send fewer images at once")
        parts.append(part)
    body = strict_json.loads(b"".join(parts).decode())
    if not isinstance(body, dict):
        raise ValueError(f"expected an object, got {type(body).__name__}")
    return body


def _images_and_prompts(body: dict[str, Any]) -> tuple[list[np.ndarray], list[Prompt]]:
    images, prompts, metadata = (_list(body, name) for name in ("images", "prompts", "metadata"))
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata: expected as many of each")
    if not all(isinstance(prompt, str) for prompt in prompts) or not all(isinstance(row, dict) for row in metadata):
        raise ValueError("expected every prompt as text and every metadata as an object")
    # What a prompt speaks of stays among its columns: `Prompt.images` is what the trainer reads, and nobody does here.
    rows = [Prompt(text=text, metadata=columns) for text, columns in zip(prompts, metadata, strict=True)]
    return [from_wire(image) for image in images], rows


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise ValueError(f"no list `{name}`")
    return value


def _refusal(error: ValueError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)
