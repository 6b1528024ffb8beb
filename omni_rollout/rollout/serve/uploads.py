"""Bodies as they come in: counted against their limit, and weights checked before they reach the engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from fastapi import Request

from omni_rollout.diffusion.machine import pin_thread
from omni_rollout.errors import WeightSyncError
from omni_rollout.models import family_module
from omni_rollout.rollout.adapter import AdapterError, is_adapter, merged, scales_of
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.rollout.serve.state import Server
from omni_rollout.rollout.serve.wire import SHARED_NAME, SHARED_TOKEN
from omni_rollout.trajectories.digest import combined_digest, tensor_digests

BODY_SECONDS = 60.0  # between two pieces of a body
SLACK = 16 << 20  # bytes of a file of weights that are no weights
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}  # as safetensors calls them


async def read_body(request: Request, limit: int, name: str) -> bytes:
    parts: list[bytes] = []
    await _each_part(request, limit, name, parts.append)
    return b"".join(parts)


async def _each_part(request: Request, limit: int, name: str, take: Callable[[bytes], object]) -> None:
    """Raises BadRequest: larger than its limit, or a client that sends nothing more."""
    size = 0
    too_large = BadRequest(f"body: larger than {limit} bytes, which is what this server takes ({name})", "body", 413)
    if request.headers.get("content-length", "0").isdecimal() and int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    parts = request.stream()
    while True:
        try:
            part = await asyncio.wait_for(anext(parts), BODY_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise BadRequest(f"body: nothing came for {BODY_SECONDS:g} s", "body", 408) from None
        size += len(part)
        if size > limit:
            raise too_large
        take(part)


async def take_weights(request: Request, server: Server, version: int, digest: str | None) -> str:
    """Reads them, from the body or from shared memory, checks them, and hands them to the engine between two policies.

    Returns:
        One digest of all of them, as the engine holds them now.

    Raises:
        BadRequest: other tensors than the engine's policy has, or other bits than were sent: nothing has been changed then.
    """
    name = request.headers.get(SHARED_NAME)
    if name is not None:
        path = server.shared.file(name) if server.shared.knows(request.headers.get(SHARED_TOKEN)) else None
        if path is None:
            raise BadRequest(f"{SHARED_NAME}: no such file in this server's shared memory", SHARED_NAME)
        try:
            return await _take(path, server, version, digest)
        finally:
            path.unlink(missing_ok=True)
    dtypes = server.host.layout.values()
    limit = SLACK + sum(torch.empty(0, dtype=getattr(torch, dtype)).element_size() * _count(shape) for dtype, shape in dtypes)
    with tempfile.NamedTemporaryFile(prefix="omni_rollout-", suffix=".safetensors") as file:
        await _each_part(request, limit, "the model's own size", file.write)
        file.flush()
        return await _take(Path(file.name), server, version, digest)


async def _take(path: Path, server: Server, version: int, digest: str | None) -> str:
    if version < 0:
        raise BadRequest(f"version: {version}, expected 0 or more", "version")
    named = await asyncio.to_thread(_load, path, server)
    if digest is not None:
        arrived = combined_digest(await asyncio.to_thread(lambda: tensor_digests(named.items())))
        if arrived != digest:
            raise BadRequest(
                f"digest: {digest[:16]} was sent, {arrived[:16]} has arrived; send it again, or, of LoRA factors: start this "
                "server with the checkpoint that they are merged into",
                "digest",
            )
    try:
        held = await server.host.update_weights(named.items(), version)
    except WeightSyncError as error:
        raise BadRequest(str(error), status=500, kind="weights_error") from error
    server.host.broken = False
    return held


def _load(path: Path, server: Server) -> dict[str, torch.Tensor]:
    layout = server.host.layout
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if is_adapter(names):
                return _merged({name: file.get_tensor(name) for name in names}, file.metadata() or {}, server)
            for name in sorted(names | layout.keys()):
                if name not in names:
                    raise BadRequest(f"{name}: missing; send all tensors of the transformer", name[:80])
                if name not in layout:
                    raise BadRequest(f"{name[:80]}: unknown; the transformer has no such tensor", name[:80])
                part = file.get_slice(name)
                dtype, shape = DTYPES.get(part.get_dtype(), part.get_dtype()), part.get_shape()
                if (dtype, shape) != layout[name]:
                    raise BadRequest(f"{name}: {dtype} {shape}, expected {layout[name][0]} {layout[name][1]}", name)
            return {name: file.get_tensor(name) for name in layout}
    except (safetensors.SafetensorError, OSError) as error:
        raise BadRequest(f"body: not readable safetensors ({str(error)[:120]})", "body") from None


def _merged(factors: Mapping[str, torch.Tensor], header: Mapping[str, str], server: Server) -> dict[str, torch.Tensor]:
    pin_thread(server.host.threads)
    model = server.config.model
    try:
        scales = scales_of(header, family_module(model.family, "spec").EXPERTS)
        return dict(merged(factors, scales, model.path, server.host.layout))
    except AdapterError as error:
        raise BadRequest(str(error), error.at) from error


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
