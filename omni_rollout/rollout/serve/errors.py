"""Errors as OpenAI's clients expect them: a status, and `{"error": {"type", "message", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from omni_rollout.errors import EngineDiedError
from omni_rollout.trajectories.capsule import CapsuleError
from omni_rollout.types import RequestError


class BadRequest(Exception):
    """What a client gave cannot be served; `param` is the field, or the limit, that it is about."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.param, self.status, self.kind = param, status, kind

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "message": str(self), "param": self.param, "code": self.status}


def error_of(error: Exception) -> BadRequest:
    """What kept one image from being made, in the words of an answer."""
    if isinstance(error, BadRequest):
        return error
    if isinstance(error, RequestError):
        return BadRequest(str(error))
    if isinstance(error, CapsuleError):  # numbers that overflowed
        return BadRequest(str(error), status=500, kind="not_finite_error")
    if isinstance(error, EngineDiedError):
        return BadRequest(str(error), status=503, kind="engine_error")
    return BadRequest(f"{type(error).__name__}: {error}", status=500, kind="sampling_error")
