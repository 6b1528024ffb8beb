"""The HTTP side: addresses, errors, tokens; what is asked goes to `Reader`, what is made comes from `Host`."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from omni_rollout.rollout.serve.answers import chat_answer, images_answer
from omni_rollout.rollout.serve.asked import Batch, from_chat
from omni_rollout.rollout.serve.bodies import Chat, Images, Rollouts, parse
from omni_rollout.rollout.serve.errors import BadRequest, error_of
from omni_rollout.rollout.serve.state import Server
from omni_rollout.rollout.serve.stream import Answer
from omni_rollout.rollout.serve.uploads import read_body, take_weights
from omni_rollout.rollout.serve.wire import SHARED_FROM, SHARED_TOKEN

TOKEN = "OMNI_ROLLOUT_TOKEN"  # environment
LOCAL = ("127.0.0.1", "::1", "localhost")
OPEN = ("/health", "/ready")  # without a token
RETRY_SECONDS = "1"


def make_app(server: Server) -> FastAPI:
    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.shared.close()

    app = FastAPI(title="omni-rollout", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    token = os.environ.get(TOKEN)
    if token is None:  # a page in a browser must not reach it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    else:
        app.add_middleware(Guard, token=token)
    app.add_exception_handler(BadRequest, lambda _, error: refusal(error))  # type: ignore[arg-type,return-value]
    app.add_exception_handler(HTTPException, lambda _, error: refusal(_of_starlette(error)))  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, lambda _, error: refusal(_of_query(error)))  # type: ignore[arg-type]
    app.add_exception_handler(Exception, lambda _, error: refusal(error_of(error)))
    _add_rollouts(app, server)
    _add_openai(app, server)
    _add_policy(app, server)
    _add_state(app, server)
    return app


class Guard:
    """Asks for the bearer token. Not as one of Starlette's own, which keep from an answer that its client has gone."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                text = f"authorization: give Bearer TOKEN, the server's {TOKEN}"
                await refusal(BadRequest(text, "authorization", 401, "auth_error"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _add_rollouts(app: FastAPI, server: Server) -> None:
    @app.post("/v1/rollouts")
    async def rollouts(request: Request) -> Response:
        weights: list[str | None] = []

        def to_batch(content: bytes) -> Batch:
            body = parse(Rollouts, content)
            weights.append(body.weights)
            return server.reader.rollouts(body)

        least = shared_from(server, request)
        batch = await read(server, request, to_batch)
        return Answer(server, batch, weights[0], least)


def shared_from(server: Server, request: Request) -> int | None:
    """Bytes of a trajectory from which on this client is answered through shared memory; None: all over the socket."""
    least = request.headers.get(SHARED_FROM, "0")
    if not server.shared.knows(request.headers.get(SHARED_TOKEN)):
        return None
    if not least.isdecimal():
        raise BadRequest(f"{SHARED_FROM}: {least[:20]!r}, expected a number of bytes", SHARED_FROM)
    return int(least)


def _add_openai(app: FastAPI, server: Server) -> None:
    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        asked: list[Images] = []

        def to_batch(content: bytes) -> Batch:
            asked.append(parse(Images, content))
            return server.reader.generation(asked[0])

        batch = await read(server, request, to_batch)
        made = await server.all_of(request, batch)
        return JSONResponse(await asyncio.to_thread(images_answer, made, asked[0].output_format or "png"))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        batch = await read(server, request, lambda content: server.reader.generation(from_chat(parse(Chat, content))))
        made = await server.all_of(request, batch)
        return JSONResponse(await asyncio.to_thread(chat_answer, made, server.model))

    @app.get("/v1/models")
    async def models() -> Response:
        card = {"id": server.model, "object": "model", "created": int(time.time()), "owned_by": "omni_rollout"}
        return JSONResponse({"object": "list", "data": [{**card, "omni_rollout": server.about()}]})


def _add_policy(app: FastAPI, server: Server) -> None:
    """pause ─► drain ─► weights ─► resume: by themselves within `/v1/weights`, or one by one for a trainer that leads."""

    @app.post("/v1/weights")
    async def weights(request: Request, version: int, digest: str | None = None) -> Response:
        if server.host.failure is not None:
            server.check_open(0)
        held = await take_weights(request, server, version, digest)
        return JSONResponse({"policy_version": version, "weights": held})

    @app.post("/pause")
    async def pause(mode: str = "abort") -> Response:
        if mode not in ("abort", "wait"):
            raise BadRequest(
                f"mode: {mode[:20]!r}, expected abort or wait; a trajectory that is kept would end under another policy", "mode"
            )
        await server.host.pause(mode)
        return JSONResponse({"status": "paused"})

    @app.post("/resume")
    async def resume() -> Response:
        await server.host.resume()
        server.draining = False
        return JSONResponse({"status": "resumed"})

    @app.get("/is_paused")
    async def is_paused() -> Response:
        return JSONResponse({"is_paused": server.host.paused})

    @app.post("/drain")
    async def drain() -> Response:
        """Takes no more, and answers when all that was taken is done."""
        server.draining = True
        while server.host.asked and server.host.failure is None:
            await asyncio.sleep(0.05)
        return JSONResponse({"status": "drained"})


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if server.host.failure is None else 503)

    @app.get("/ready")
    async def ready() -> Response:
        server.check_open(0)
        return JSONResponse({"status": "paused" if server.host.paused else "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.media_type)


async def read(server: Server, request: Request, to_batch: Callable[[bytes], Batch]) -> Batch:
    """What a body asks for. Raises BadRequest: something in it, or that nothing can be taken now."""
    check_json(request)
    content = await read_body(request, server.limits.max_body_mb << 20, "serve.max_body_mb")
    batch = await asyncio.to_thread(to_batch, content)  # images are unpacked, texts cut into tokens
    try:
        server.check_open(len(batch.requests))
    except BadRequest:
        server.reader.release(batch)
        raise
    return batch


def check_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":  # which a page in a browser cannot send without asking
        raise BadRequest(f"content-type: {kind or 'none'}, expected application/json", "content-type", 415)


def refusal(error: BadRequest) -> Response:
    headers = {"retry-after": RETRY_SECONDS} if error.status in (429, 503) else None
    return JSONResponse({"error": error.to_json()}, status_code=error.status, headers=headers)


def _of_query(error: Any) -> BadRequest:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return BadRequest(f"{param}: {first['msg']}", param)


def _of_starlette(error: Any) -> BadRequest:
    return BadRequest(str(error.detail), status=error.status_code)
