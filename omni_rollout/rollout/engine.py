"""`RolloutEngine`: vllm-omni's diffusion engine as a plain object in this process.

requests ─► generate ─► _sample (one coroutine each) ─► engine.step_streaming ─► Decoder ─► _trajectory ─► yielded
                                                update_weights ─► _drain ─► load_policy ─► digests compared
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version as package_version
from typing import Any

import numpy as np
import torch
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

from omni_rollout.diffusion.machine import pin_switches
from omni_rollout.errors import EngineDiedError, EngineHungError, PinnedKnobError, WeightSyncError
from omni_rollout.models import family_module
from omni_rollout.rollout.architecture import register
from omni_rollout.rollout.decoding import DecodeError, Decoder
from omni_rollout.rollout.guards import check_alone, check_distinct, check_pinned, check_threads, close_at_exit, without_bars
from omni_rollout.rollout.platform.linear import register_linears
from omni_rollout.rollout.request import engine_request
from omni_rollout.trajectories.digest import combined_digest, tensor_digest, tensor_digests
from omni_rollout.types import RolloutRequest, Trajectory

PACKAGES = ("torch", "vllm-omni", "diffusers", "transformers")
LIVENESS_SECONDS = 5.0  # between looks at whether the engine's thread still runs
Record = dict[str, Any]  # of one image, as `RolloutMixin.post_decode` makes it
OnError = Callable[[RolloutRequest, Exception], None]


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
        pipeline = family_module(family, "spec").ROLLOUT_PIPELINE
        self.threads = torch.get_num_threads()
        if parity != "fast":
            pin_switches()
        if parity == "exact":
            register_linears()
        settings: dict[str, Any] = {
            "model": path,
            "model_class_name": register(family),
            "dtype": dtype,
            "enforce_eager": parity != "fast",
            "distributed_executor_backend": "uni",
            "step_execution": True,
            "max_num_seqs": max_num_seqs,
            "cache_backend": "none",
            "enable_prompt_embed_cache": True,
            "custom_pipeline_args": {"pipeline_class": pipeline, "parity": parity, "threads": self.threads},
            "diffusion_attention_config": None if parity == "fast" else {"default": {"backend": "TORCH_SDPA"}},
            "worker_extension_cls": "omni_rollout.rollout.worker.RolloutWorkerExtension",
        }
        config = OmniDiffusionConfig(**settings)
        config.enrich_config()
        config.master_port = 0  # the system's choice as the socket is opened: a number chosen before may be taken by then
        self._engine = DiffusionEngine.make_engine(config)
        self._engine.post_process_func = None  # the stock one turns the image into PIL and drops the rest
        torch.set_num_threads(self.threads)  # the engine's start may change it for the whole process
        self._loop = asyncio.new_event_loop()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._closed = False
        self._serial = itertools.count()
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

    def generate(
        self, requests: Iterable[RolloutRequest], on_error: OnError | None = None, *, timeout: float | None = None
    ) -> Iterator[Trajectory]:
        """Submits all requests at once and yields trajectories as they finish, those of one size a few at a time.

        A request that fails does not touch the others. `on_error` is told of it; without one, an ExceptionGroup of
        all failures is raised after the last trajectory. After `timeout` seconds without a finished one EngineHungError is
        raised; `close` then leaves the engine's thread as it is.
        """
        self._check_open()
        if self.parity != "fast":
            check_threads(self.threads)
        requests = list(requests)
        check_distinct(requests)
        finished: asyncio.Queue[tuple[RolloutRequest, Record | Exception]] = asyncio.Queue()
        for request in requests:
            task = self._loop.create_task(self._sample(request, finished))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)
        failures: list[Exception] = []
        decoder = Decoder(self.pipeline.decode_beside_the_loop, requests)

        def failed(request: RolloutRequest, error: Exception) -> None:
            failures.append(error) if on_error is None else on_error(request, error)

        def made(ready: Iterator[tuple[RolloutRequest, Record, np.ndarray]]) -> Iterator[Trajectory]:
            try:
                for request, record, media in ready:
                    yield self._trajectory(request, record, media)
            except DecodeError as error:
                for request in error.requests:
                    failed(request, error)

        for _ in requests:
            try:
                request, result = self._next(finished, timeout)
            except (EngineDiedError, EngineHungError):
                while decoder.waits:
                    yield from made(decoder.rest())  # what has finished is kept
                raise
            if isinstance(result, Exception):
                failed(request, result)
            yield from made(decoder.add(request, None if isinstance(result, Exception) else result))
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(requests)} rollout requests failed", failures)

    def _next(self, finished: asyncio.Queue[Any], timeout: float | None) -> Any:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                patience = min(LIVENESS_SECONDS, max(end - time.monotonic(), 0))
                return self._loop.run_until_complete(asyncio.wait_for(finished.get(), patience))
            except TimeoutError:
                if time.monotonic() >= end:
                    self._closed = True  # there is nobody to drain, or to close
                    raise EngineHungError(f"no image for {timeout:g} s (rollout.timeout): the engine hangs") from None
                if not self._alive:
                    raise EngineDiedError(
                        "the engine's thread has ended, see its error above; make a new RolloutEngine"
                    ) from None

    @property
    def _alive(self) -> bool:
        thread = getattr(self._engine, "worker_thread", None)  # made with the first request
        return thread is None or thread.is_alive()

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Replaces the policy, after every trajectory in flight has finished under the old one.

        Args:
            named: all tensors of the transformer, by checkpoint name, in the engine's dtype.

        Returns:
            One digest of all of them.

        Raises:
            WeightSyncError: a tensor missing, unknown, or different in the engine afterwards; it is named.
        """
        self._check_open()
        self._drain()
        tensors = dict(named)
        sent = tensor_digests(tensors.items())
        held = self._rpc("load_policy", list(tensors.items()), version)
        for name in sorted(sent.keys() | held.keys()):
            if sent.get(name) != held.get(name):
                where = "not sent" if name not in sent else "not in the engine" if name not in held else "different there"
                raise WeightSyncError(
                    f"weight {name}: {where} after update to version {version}; the engine must be loaded again from a "
                    "checkpoint before its trajectories can be trained on"
                )
        self.policy_version = version
        self._adopt(held)
        return combined_digest(sent)

    def close(self) -> None:
        """Frees the engine; another may be made afterwards. Destroys the process's torch.distributed group with it."""
        if self._closed:
            return
        self._drain()
        self._closed = True
        self._engine.close()
        self._loop.close()
        del self._engine
        gc.collect()

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt(self, digests: dict[str, str]) -> None:
        versions = {name: package_version(name) for name in PACKAGES}
        self._fingerprint = {
            "dtype": self.dtype,
            "attention": "TORCH_SDPA" if self.parity != "fast" else "engine default",
            "parity": self.parity,
            "versions": versions,
            "weights": combined_digest(digests),
        }

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
        return self._rpc("policy_digests")

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._engine.collective_rpc(method, args=args, unique_reply_rank=0)

    def _drain(self) -> None:
        while self._in_flight:
            self._loop.run_until_complete(asyncio.wait(self._in_flight, timeout=LIVENESS_SECONDS))
            if not self._alive:
                for task in self._in_flight:
                    task.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this RolloutEngine is closed; make a new one")

    async def _sample(
        self, request: RolloutRequest, finished: asyncio.Queue[tuple[RolloutRequest, Record | Exception]]
    ) -> None:
        try:
            output = None
            async for outputs in self._engine.step_streaming(engine_request(request, next(self._serial))):
                output = outputs[0]
            assert output is not None
            result: Record | Exception = output.multimodal_output["metadata"]["rollout"]
        except Exception as error:  # reported to the caller, by `generate`
            result = error
        await finished.put((request, result))

    def _trajectory(self, request: RolloutRequest, record: Record, media: np.ndarray) -> Trajectory:
        def own(name: str) -> torch.Tensor:  # inference tensors cannot be saved for a backward pass; their clones can
            return record[name].clone().cpu()

        guided = request.spec.guided
        return Trajectory(
            latents=own("latents"),
            log_probs=own("log_probs"),
            step_indices=torch.tensor(request.spec.step_indices, dtype=torch.int64),
            sigmas=own("sigmas"),
            timesteps=own("timesteps"),
            prompt_embeds=own("prompt_embeds"),
            prompt_embeds_mask=own("prompt_embeds_mask"),
            negative_prompt_embeds=own("negative_prompt_embeds") if guided else None,
            negative_prompt_embeds_mask=own("negative_prompt_embeds_mask") if guided else None,
            conditions={name: tensor.clone().cpu() for name, tensor in record["conditions"].items()},
            media=media,
            prompt=request.prompt,
            spec=request.spec,
            seed=request.seed,
            group_id=request.group_id,
            member=request.member,
            policy_version=record["policy_version"],
            fingerprint={
                **self._fingerprint,
                "machine": {**self.machine, **record["machine"]},
                "prompt_width": request.spec.prompt_width,
                "negative_prompt_width": request.spec.negative_prompt_width if guided else None,
                "guided": guided,
                "batch_sizes": record["batch_sizes"],
                "initial_noise": tensor_digest(record["initial_noise"])[:16],
            },
        )
