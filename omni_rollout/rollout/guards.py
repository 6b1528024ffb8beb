"""What keeps a RolloutEngine from being left running, or being asked for two things under one name."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from vllm.model_executor.model_loader import weight_utils

from omni_rollout.errors import PinnedKnobError, UserError, WeightSyncError
from omni_rollout.launch.progress import VERBOSE
from omni_rollout.types import RequestError, RolloutRequest

PINNED: dict[str, tuple[Any, ...]] = {  # knob of the engine -> values under which the bits were compared
    "attention": (["ExactCpuSDPAImpl"], ["ExactSDPAImpl"]),  # on a CPU, on a GPU
    "linear": (True,),
    "compiled": (False,),
    "cache_backend": ("none",),
    "quantization": (None,),
    "parallel": ((1, 1, 1),),
    "native": (True,),
}


def without_bars() -> None:
    """vllm draws one for each file it reads, whatever the level of its log; OMNI_ROLLOUT_VERBOSE=1 leaves them."""
    if os.environ.get(VERBOSE) != "1":
        weight_utils.enable_tqdm = lambda use_tqdm_on_load: False


class Closable(Protocol):
    _closed: bool

    def close(self) -> None: ...


_latest: list[weakref.ref[Closable]] = []  # the engine of this process, the last that was made


def check_alone() -> None:
    """Raises UserError while an engine of this process is open."""
    engine = _latest[-1]() if _latest else None
    if engine is not None and not engine._closed:
        raise UserError("a RolloutEngine is open in this process, and there is room for one: close() it before making another")


def close_at_exit(engine: Closable) -> None:
    # The engine's thread is no daemon: a program that ends without `close` would wait for it for ever. An ordinary
    # atexit handler runs after that wait; this hook, which concurrent.futures uses for the same purpose, before it.
    reference = weakref.ref(engine)
    _latest[:] = [reference]

    def close() -> None:
        left = reference()
        if left is not None:
            left.close()

    threading._register_atexit(close)  # type: ignore[attr-defined]


def check_pinned(knobs: Mapping[str, Any]) -> None:
    """Raises PinnedKnobError, naming what the exact profile pins and the engine has otherwise."""
    for name, expected in PINNED.items():
        if knobs[name] not in expected:
            raise PinnedKnobError(
                f"parity=exact pins the engine's {name} to {' or '.join(map(str, expected))}, here it is {knobs[name]}; "
                "look for environment variables that set it, or choose parity=fast and watch parity/ppo_kl_mb0"
            )


def check_threads(threads: int) -> None:
    """Raises PinnedKnobError where the calling thread, the trainer's, has another number than the engine was made with."""
    here = torch.get_num_threads()
    if here != threads:
        raise PinnedKnobError(
            f"threads={here} here, the engine computes with {threads}: products round by the number of threads; "
            "call torch.set_num_threads before the engine is made (threads=N), and not again"
        )


def check_distinct(requests: Sequence[RolloutRequest]) -> None:
    """Raises RequestError, naming an id that is given twice."""
    seen: set[str] = set()
    for request in requests:
        if request.request_id in seen:
            raise RequestError(f"request_id {request.request_id!r} is given twice: one call of generate needs distinct ids")
        seen.add(request.request_id)


def check_synced(sent: Mapping[str, str], held: Mapping[str, str], version: int) -> None:
    """Raises WeightSyncError, naming the first tensor whose digest in the engine is not that of what was sent.

    Args:
        sent: by name; empty where the tensor that was sent is the engine's own.
    """
    for name in sorted(sent.keys() | held.keys()):
        if name not in sent or name not in held or sent[name] not in ("", held[name]):
            where = "not sent" if name not in sent else "not in the engine" if name not in held else "different there"
            raise WeightSyncError(
                f"weight {name}: {where} after update to version {version}; the engine must be loaded again from a "
                "checkpoint before its trajectories can be trained on"
            )
