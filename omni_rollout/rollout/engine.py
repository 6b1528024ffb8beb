"""`RolloutEngine`: vllm-omni's diffusion engine as a plain object in this process.

requests ─► generate ─► submit ─► _sample (one coroutine each) ─► engine.step_streaming ─► Decoder ─► _trajectory ─► yielded
                                                update_weights ─► _drain ─► load_weights ─► adopt_policy ─► digests compared
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from omni_rollout.diffusion.host import keep_freed_memory, let_helpers_go
from omni_rollout.diffusion.machine import pin_switches
from omni_rollout.errors import EngineDiedError, EngineHungError, PinnedKnobError
from omni_rollout.rollout.architecture import engine_config
from omni_rollout.rollout.decoding import DecodeError, Decoder
from omni_rollout.rollout.delivery import OnError, Result, delivered
from omni_rollout.rollout.guards import (
    check_alone,
    check_distinct,
    check_pinned,
    check_synced,
    check_threads,
    close_at_exit,
    without_bars,
)
from omni_rollout.rollout.own_world import OwnWorld
from omni_rollout.rollout.platform.linear import register_linears
from omni_rollout.rollout.records import engine_request, fingerprint, to_trajectory, together
from omni_rollout.trajectories.digest import buckets, combined_digest, tensor_digests
from omni_rollout.types import RolloutRequest, Trajectory

LIVENESS_SECONDS = 5.0  # between looks at whether the engine's thread still runs
Record = dict[str, Any]  # of one image, as `RolloutMixin.post_decode` makes it
Deliver = Callable[[Trajectory | Exception], None]


class RolloutEngine:
    """Samples trajectories with continuous batching. One at a time per process (UserError): close it before making another.

    Args:
        path: a checkpoint in diffusers layout.
        family: a folder under `omni_rollout.models`.
        dtype: what the transformer computes in; text encoder and VAE keep the checkpoint's.
        max_num_seqs: requests denoised together at most.
        parity: `exact`, `fast` or `reference`; see `config.Parity`.

    Raises:
        PinnedKnobError: something of this machine or environment changed what the exact profile pins.
    """

    def __init__(
        self,
        path: str,
        *,
        family: str = "qwen_image",
        dtype: str = "float32",
        max_num_seqs: int = 8,
        parity: str = "exact",
    ) -> None:
        check_alone()
        without_bars()
        keep_freed_memory()
        self.threads = torch.get_num_threads()
        if parity != "fast":
            pin_switches()
        if parity == "exact":
            register_linears()
        self._world = OwnWorld()
        self._engine = self._world.open(engine_config(path, family, dtype, max_num_seqs, parity, self.threads))
        self._engine.post_process_func = None  # the stock one turns the image into PIL and drops the rest
        torch.set_num_threads(self.threads)  # the engine's start may change it for the whole process
        self.loop = asyncio.new_event_loop()  # runs while something is waited for; a server runs it all the time
        self.in_flight: set[asyncio.Task[Record]] = set()
        self._closed = self._given_back = False
        self._serial = itertools.count()
        beside = self.threads if torch.device(self.pipeline.device).type == "cpu" else 1
        self._decoder = Decoder(
            lambda latents, spec: self.pipeline.decode_beside_the_loop(latents, spec), self._decoded, self.loop, beside
        )
        close_at_exit(self)
        self.dtype, self.parity, self.policy_version = dtype, parity, 0
        try:
            if parity == "exact":
                check_pinned(self._rpc("pinned_knobs"))
            self.machine: dict[str, Any] = self._rpc("check_machine", parity != "fast")
        except PinnedKnobError:
            self.close()
            raise
        self._adopt(self.policy_digests())
        let_helpers_go()  # the engine's own thread samples

    def generate(
        self, requests: Iterable[RolloutRequest], on_error: OnError | None = None, *, timeout: float | None = None
    ) -> Iterator[Trajectory]:
        """Submits all requests at once and yields trajectories as they finish, those of one size a few at a time.

        A request that fails does not touch the others: `on_error` is told, or an ExceptionGroup of all is raised at the end.
        After `timeout` seconds without a finished one EngineHungError is raised; `close` then leaves the engine's thread.
        """
        self._check_open()
        self._check_weights()
        if self.parity != "fast":
            check_threads(self.threads)
        check_distinct(requests := list(requests))
        let_helpers_go()
        yield from delivered(self._results(requests, timeout), len(requests), on_error)
        if self.alive:
            self._rpc("let_helpers_go")

    def _results(self, requests: Sequence[RolloutRequest], timeout: float | None) -> Iterator[Result]:
        finished: asyncio.Queue[Result] = asyncio.Queue()
        for request in together(requests):
            self.submit(request, lambda result, request=request: finished.put_nowait((request, result)))
        for _ in requests:
            try:
                yield self._next(finished, timeout)
            except (EngineDiedError, EngineHungError):
                self._decoder.finish()  # what has finished is kept
                while not finished.empty():
                    yield finished.get_nowait()
                raise

    def submit(self, request: RolloutRequest, deliver: Deliver) -> asyncio.Task[Record]:
        """Admits one beside those in flight, in the thread of `loop`, where `deliver` is told once what became of it.

        A task that is cancelled gives its place in the batch to another request, and delivers nothing.
        """
        self._decoder.expect(request)
        task = self.loop.create_task(self._sample(request))
        self.in_flight.add(task)
        task.add_done_callback(lambda task: self._sampled(task, request, deliver))
        return task

    def _next(self, finished: asyncio.Queue[Result], timeout: float | None) -> Result:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            patience = min(LIVENESS_SECONDS, max(end - time.monotonic(), 0))
            try:
                return self.loop.run_until_complete(asyncio.wait_for(finished.get(), patience))
            except TimeoutError:
                if not finished.empty():  # it was made while the loop could not look at its clock
                    continue
                if time.monotonic() >= end:
                    self._closed = True  # there is nobody to drain, or to close
                    raise EngineHungError(f"no image for {timeout:g} s (rollout.timeout): the engine hangs") from None
                if not self.alive:
                    text = "the engine's thread has ended, see its error above; make a new RolloutEngine"
                    raise EngineDiedError(text) from None

    @property
    def alive(self) -> bool:
        """Whether the engine's own thread runs; without it nothing is finished any more."""
        thread = getattr(self._engine, "worker_thread", None)  # made with the first request
        return thread is None or thread.is_alive()

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Replaces the policy, after every trajectory in flight has finished under the old one.

        Args:
            named: all tensors of the transformer, by checkpoint name, in the engine's dtype; those of `policy_tensors` stay.

        Returns:
            One digest of all of them.

        Raises:
            WeightSyncError: a tensor missing, unknown, or different in the engine afterwards; it is named.
        """
        self._check_open()
        self._drain()
        sent: dict[str, str] = {}  # "": it is the engine's own
        for bucket in buckets(named, 32 << 20):
            sent |= dict.fromkeys(dict(bucket), "") | tensor_digests(self._rpc("load_weights", bucket))
        held = self._rpc("adopt_policy", version)
        check_synced(sent, held, version)
        self.policy_version, self._given_back = version, False
        self._adopt(held)
        return combined_digest(held)

    def give_back(self, keep: Collection[str] = ()) -> None:
        """Frees the policy's weights until the next `update_weights`, but for what shares memory with those named in `keep`."""
        self._check_open()
        self._drain()
        self._given_back = True
        self._rpc("give_back", keep)

    def beside_policy(self) -> list[torch.Tensor]:
        """Text encoder and VAE, in the engine's own memory: what it needs to sample, and for nothing else."""
        return self._rpc("beside_policy")

    def close(self) -> None:
        """Frees the engine; another may be made afterwards."""
        if self._closed:
            return
        self._drain()
        self._closed = True
        self._decoder.close()
        self._world.close(self._engine)
        self.loop.close()
        del self._engine
        gc.collect()

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt(self, digests: dict[str, str]) -> None:
        self._fingerprint = fingerprint(self.dtype, self.parity, combined_digest(digests))

    @property
    def max_num_seqs(self) -> int:
        """Requests denoised together at most; may be set between calls, to no more than the engine was made for."""
        return self._engine.scheduler.max_num_running_reqs

    @max_num_seqs.setter
    def max_num_seqs(self, number: int) -> None:
        self._engine.scheduler.max_num_running_reqs = number

    @property
    def weights_digest(self) -> str:
        return self._fingerprint["weights"]

    @property
    def pipeline(self) -> Any:
        """The pipeline inside the engine, which runs in this process: for instruments that compare it with the trainer's."""
        executor: Any = self._engine.executor
        return executor.driver_worker.worker.model_runner.pipeline

    def policy_digests(self) -> dict[str, str]:
        """Digest of every tensor of the transformer as the engine holds it, by checkpoint name."""
        self._check_weights()
        return self._rpc("policy_digests")

    def policy_tensors(self) -> dict[str, torch.Tensor]:
        """What `policy_digests` names, in the engine's own memory: whoever shares it writes only while nothing is sampled."""
        self._check_weights()
        return self._rpc("policy_tensors")

    def policy_layout(self) -> dict[str, tuple[str, list[int]]]:
        """dtype and shape of what `policy_digests` names."""
        return self._rpc("policy_layout")

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._engine.collective_rpc(method, args=args, unique_reply_rank=0)

    @property
    def busy(self) -> set[asyncio.Future[Any]]:
        """What is in flight or being decoded."""
        return {*self.in_flight, *self._decoder.busy}

    def _drain(self) -> None:
        while self.busy:
            self.loop.run_until_complete(asyncio.wait(self.busy, timeout=LIVENESS_SECONDS))
            if not self.alive:
                for task in self.in_flight:
                    task.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this RolloutEngine is closed; make a new one")

    def _check_weights(self) -> None:
        if self._given_back:
            raise RuntimeError("this engine's weights were given back for an update: call update_weights first")

    async def _sample(self, request: RolloutRequest) -> Record:
        asked, output = engine_request(request, next(self._serial)), None
        try:
            async for outputs in self._engine.step_streaming(asked):
                output = outputs[0]
        except asyncio.CancelledError:
            self._engine.abort(asked.request_id)
            raise
        assert output is not None
        return output.multimodal_output["metadata"]["rollout"]

    def _sampled(self, task: asyncio.Task[Record], request: RolloutRequest, deliver: Deliver) -> None:
        self.in_flight.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            deliver(error)
        done = not task.cancelled() and error is None
        self._decoder.add(request, {**task.result(), "deliver": deliver} if done else None)

    def _decoded(self, request: RolloutRequest, record: Record, media: np.ndarray | DecodeError) -> None:
        if isinstance(media, DecodeError):
            record["deliver"](media)
            return
        machine = {**self.machine, **record["machine"]}
        record["deliver"](to_trajectory(request, record, media, {**self._fingerprint, "machine": machine}))
