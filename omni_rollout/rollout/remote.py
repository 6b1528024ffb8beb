"""`RemoteEngine`: an engine in another process, or on another machine, with `RolloutEngine`'s own interface.

generate ─► POST /v1/rollouts ─► frames ─► capsule (shared memory where both are on one machine) ─► yielded
update_weights ─► a file of safetensors ─► POST /v1/weights ─► digests compared

A server that is lost is waited for, given the weights it must hold again, and asked for what is not finished.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch

from omni_rollout.errors import EngineDiedError, EngineHungError, RunFailedError, UserError, WeightSyncError
from omni_rollout.models.base.images import read_image
from omni_rollout.rollout.delivery import OnError, Result, delivered
from omni_rollout.rollout.guards import check_distinct
from omni_rollout.rollout.serve import wire
from omni_rollout.rollout.serve.shared import new_name, offered, sweep
from omni_rollout.rollout.serve.wire import SHARED_BYTES, SHARED_NAME, CutOffError, frames, sharing, to_body
from omni_rollout.trajectories.capsule import decode_capsule, load_capsule
from omni_rollout.trajectories.digest import combined_digest, tensor_digests
from omni_rollout.types import RequestError, RolloutRequest, Trajectory

TOKEN = "OMNI_ROLLOUT_TOKEN"  # environment, of both sides
SILENCE_SECONDS = 60.0  # without a byte, where a frame is due every few: the server is gone
RETRY_SECONDS = 0.5
REQUEST_BYTES = 20_000  # of one in a body without its pictures, at most
PATIENCE = 600.0  # seconds that a server may take to come back, where no time-out is given
AGAIN = ("weights_error", "engine_error", "draining_error", "aborted_error", "rate_limit_error")  # not the request's fault
LOST = (httpx.TransportError, CutOffError)


class ServerError(RunFailedError):
    """What a server answered instead of doing what it was asked."""

    def __init__(self, message: str, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, error.get("type"), error.get("param")


class RemoteEngine:
    """Samples with the engine of an `omni-rollout serve`.

    Args:
        url: as the server prints it.
        token: None: OMNI_ROLLOUT_TOKEN of the environment, if it is set.
        shared: bytes from which on a trajectory passes through shared memory, where both are on one machine, and not the
            socket; None: nothing does, weights neither.
        waits: for a server that is lost; False: EngineDiedError is raised instead, for others to take over.

    Raises:
        UserError: nobody answers there, or the token is not the server's.
    """

    def __init__(self, url: str, token: str | None = None, *, shared: int | None = SHARED_BYTES, waits: bool = True) -> None:
        token = os.environ.get(TOKEN) if token is None else token
        headers = {"authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, read=SILENCE_SECONDS)
        self._url, self._shared, self._waits = url.rstrip("/"), shared, waits
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout, trust_env=False)
        self._weights: Any = None  # a file of those that were sent last: a server that is started again needs them
        self._closed = False
        try:
            self._meet()
        except (*LOST, ServerError) as error:
            self._http.close()
            raise UserError(f"{self._url}: {error}; is omni-rollout serve running there, with this {TOKEN}?") from error
        self.policy_version: int = self.about["policy_version"]
        self.weights_digest: str = self.about["weights"]

    def _meet(self) -> None:
        """Asks the server what it is, and whether it shares its memory with this process."""
        card = self._json(self._http.get("/v1/models"))["data"][0]
        self.about: dict[str, Any] = card["omni_rollout"]
        self.machine: dict[str, Any] = self.about["machine"]
        self._memory = None if self._shared is None else offered(self.about["shared_memory"])

    @property
    def shares_memory(self) -> bool:
        return self._memory is not None

    def generate(
        self, requests: Iterable[RolloutRequest], on_error: OnError | None = None, *, timeout: float | None = None
    ) -> Iterator[Trajectory]:
        """As `RolloutEngine.generate`. A server that is lost meanwhile may take `timeout` seconds to come back."""
        self._check_open()
        requests = list(requests)
        check_distinct(requests)
        yield from delivered(self._results(requests, timeout), len(requests), on_error)

    def _results(self, requests: Sequence[RolloutRequest], timeout: float | None) -> Iterator[Result]:
        left = dict(enumerate(requests))
        patience = PATIENCE if timeout is None else timeout
        for position, request in enumerate(requests):
            try:
                for image in request.prompt.images:
                    read_image(image)
            except RequestError as error:  # before it could sink the body that it is part of
                yield left.pop(position), error
        last = time.monotonic()
        while left:
            try:
                for answer in self._answers(left):
                    if answer is not None:
                        position, result = answer
                        yield left.pop(position), result
                        last = time.monotonic()  # not counting what was done with it
                    elif timeout is not None and time.monotonic() - last > timeout:
                        raise EngineHungError(f"no image from {self._url} for {timeout:g} s (rollout.timeout): it hangs")
            except LOST as error:
                self._find_again(last + patience, error)

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """As `RolloutEngine.update_weights`; what was sent is kept in a file as long as it is the policy."""
        self._check_open()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named}
        digest = combined_digest(tensor_digests(tensors.items()))
        if self._weights is not None:
            self._weights.close()
        self._weights = tempfile.NamedTemporaryFile(prefix="omni_rollout-", suffix=".safetensors")  # noqa: SIM115, till `close`
        safetensors.torch.save_file(tensors, self._weights.name)
        self.policy_version, self.weights_digest = version, digest
        try:
            self._send_weights()
        except LOST as error:
            if self._waits:
                self._find_again(time.monotonic() + PATIENCE, error)
        return digest

    def _send_weights(self) -> None:
        query = {"version": self.policy_version, "digest": self.weights_digest}
        shared = None
        try:
            if self._memory is not None:
                folder, token = self._memory
                shared = folder / new_name()
                if not folder.exists():
                    raise CutOffError(f"{folder} is gone, and the server with it")
                shutil.copyfile(self._weights.name, shared)
                headers = sharing(token, SHARED_NAME, shared.name)
                answer = self._http.post("/v1/weights", params=query, headers=headers, timeout=PATIENCE)
            else:
                with Path(self._weights.name).open("rb") as content:
                    headers = {"content-type": wire.WEIGHTS}
                    answer = self._http.post("/v1/weights", params=query, headers=headers, content=content, timeout=PATIENCE)
            held = self._json(answer)["weights"]
        except ServerError as error:
            raise WeightSyncError(f"{self._url}: {error}") from error
        finally:
            if shared is not None:
                shared.unlink(missing_ok=True)
        if held != self.weights_digest:
            raise WeightSyncError(f"{self._url} holds weights {held[:16]}, sent were {self.weights_digest[:16]}")

    def _answers(self, left: Mapping[int, RolloutRequest]) -> Iterator[tuple[int, Trajectory | Exception] | None]:
        """Of one body's worth of requests; None: the server is there, and works."""
        chosen = self._body(left)
        body = to_body([request for _, request in chosen], self.weights_digest)
        headers = {} if self._memory is None else sharing(self._memory[1], wire.SHARED_FROM, self._shared)
        with self._http.stream("POST", "/v1/rollouts", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
                yield self._refused(answer, chosen)
                return
            for head, content in frames(answer.iter_raw()):
                if head["type"] == "alive":
                    yield None
                elif head["type"] == "error":
                    position, request = chosen[head["index"]]
                    if head["error"]["type"] in AGAIN:
                        raise CutOffError(head["error"]["message"])
                    yield position, _error(request, head["error"])
                elif head["type"] == "trajectory":
                    position, request = chosen[head["index"]]
                    yield position, self._trajectory(request, head, content)

    def _body(self, left: Mapping[int, RolloutRequest]) -> list[tuple[int, RolloutRequest]]:
        """As many as one body may hold, with their pictures."""
        chosen: list[tuple[int, RolloutRequest]] = []
        pictures: set[str] = set()
        size = 0
        for position, request in left.items():
            new = {image.sha256: image for image in request.prompt.images if image.sha256 not in pictures}
            size += REQUEST_BYTES + sum(4 * Path(image.path).stat().st_size // 3 for image in new.values())
            if chosen and (len(chosen) == self.about["max_requests"] or size > self.about["max_body_bytes"]):
                break
            chosen.append((position, request))
            pictures |= new.keys()
        return chosen

    def _refused(self, answer: httpx.Response, chosen: Sequence[tuple[int, RolloutRequest]]) -> tuple[int, Exception] | None:
        """Of a body that was refused: for one of its requests, which is told, or for all."""
        try:
            self._json(answer)
        except ServerError as error:
            if error.kind in AGAIN:
                raise CutOffError(str(error)) from error
            place = str(error.param).split(".")
            if place[0] == "requests" and len(place) > 1 and place[1].isdecimal():
                position, request = chosen[int(place[1])]
                return position, RequestError(f"request {request.request_id}: {error}")
            raise
        return None

    def _trajectory(self, request: RolloutRequest, head: Mapping[str, Any], content: bytes) -> Trajectory:
        if "shared" in head:
            assert self._memory is not None
            path = self._memory[0] / Path(head["shared"]).name
            if not path.exists():
                raise CutOffError(f"{path.name} is gone from shared memory, and the server with it")
            try:
                trajectory = load_capsule(path)
            finally:
                path.unlink(missing_ok=True)  # what is mapped stays until its last tensor goes
        else:
            trajectory = decode_capsule(content, request.request_id)
        for name in ("spec", "seed", "group_id", "member"):
            asked, made = getattr(request, name), getattr(trajectory, name)
            if asked != made:
                raise RunFailedError(f"{self._url}: asked for {name} {asked}, it understood {made}; is it of another version?")
        return replace(trajectory, prompt=request.prompt)  # with its metadata, which stayed here

    def _find_again(self, end: float, error: Exception) -> None:
        """Waits for a server that is lost. Raises EngineHungError at `end`; EngineDiedError at once, where nobody waits."""
        if not self._waits:
            raise EngineDiedError(f"{self._url} is lost: {error}") from error
        while True:
            if time.monotonic() > end:
                text = f"{self._url} is lost, and did not come back in time (rollout.timeout): {error}"
                raise EngineHungError(text) from error
            time.sleep(RETRY_SECONDS)
            if self.is_back():
                return

    def is_back(self) -> bool:
        """Whether a server that was lost takes requests again; it is given the weights it must hold."""
        try:
            self._json(self._http.get("/health"))
            self._meet()
            if (self.about["policy_version"], self.about["weights"]) != (self.policy_version, self.weights_digest):
                if self._weights is None:
                    raise RunFailedError(f"{self._url} came back with other weights than it had; none were sent from here")
                self._send_weights()
            self._json(self._http.get("/ready"))
            return True
        except LOST:
            if self._memory is not None:
                sweep()  # a server that was killed could not clear its memory away
        except ServerError as refused:
            if refused.kind not in AGAIN and refused.status < 500:
                raise
        return False

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code == 200:
            return answer.json() if answer.content else {}
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": answer.text[:200]}
        raise ServerError(f"{answer.status_code}: {error['message']}", answer.status_code, error)

    def close(self) -> None:
        """The server goes on."""
        if not self._closed:
            self._closed = True
            self._http.close()
            if self._weights is not None:
                self._weights.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this RemoteEngine is closed; make a new one")


def _error(request: RolloutRequest, error: Mapping[str, Any]) -> Exception:
    text = f"request {request.request_id}: {error['message']}"
    return RequestError(text) if error["type"] == "invalid_request_error" else RuntimeError(text)
