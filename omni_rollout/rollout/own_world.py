"""Process groups of an engine, kept apart from those of the process that it lives in.

vllm-omni's worker in this process is rank 0 of a world of one. It writes RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* for that
world, and makes it torch's default group; a default group that is there already it takes for its own, of many ranks. Closing
it destroys the default group, and every other group of the process with it (vllm_omni/diffusion/worker/diffusion_worker.py,
distributed/parallel_state.py). A trainer's rank could not live beside it.

So it is opened and closed while the process has no default group: it makes its own, and finds none to destroy. What was
there is put back. While it samples, it names its own groups in every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch.distributed as dist
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

from omni_rollout.errors import UserError

MADE_FOR = {"torch": "2.13", "vllm-omni": "0.28"}  # what is said above was read there; another release may do otherwise
WRITTEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class OwnWorld:
    """Of one engine, from `open` to `close`."""

    _group: dist.ProcessGroup | None = None  # torch's default group, for the engine

    def open(self, config: OmniDiffusionConfig) -> DiffusionEngine:
        """Raises UserError: another release of torch or vllm-omni is installed."""
        check_releases()
        config.master_port = 0  # the system's choice as the socket is opened: a number chosen before may be taken by then
        with _no_default_group():
            engine = DiffusionEngine.make_engine(config)
            self._group = dist.group.WORLD
        return engine

    def close(self, engine: DiffusionEngine) -> None:
        with _no_default_group():
            engine.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)


def check_releases() -> None:
    for package, expected in MADE_FOR.items():
        if (found := version(package)).split("+")[0].split(".")[:2] != expected.split("."):
            raise UserError(f"{package} {found} is installed: expected {expected}.*; see omni_rollout/rollout/own_world.py")


@contextmanager
def _no_default_group() -> Iterator[None]:
    """Inside, this process is no rank of anything; afterwards it is again what it was."""
    group, written = dist.group.WORLD, {name: os.environ.get(name) for name in WRITTEN}
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = group
        for name, value in written.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
