"""Our classes under the names that verl's tests use: verl loads this in every process of a test, pytest as a plug-in too.

The environment says which row of the table (SUBSTITUTE) and which defect, if any, is planted in our class (PLANTED).
"""

from __future__ import annotations

import importlib
import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import verl  # noqa: F401  # before our classes, as everywhere

from omni_rollout.config import RewardConfig, TrainConfig
from omni_rollout.integrations.verl.platform import CpuPlatform
from omni_rollout.integrations.verl.rank import TrainerRank
from omni_rollout.integrations.verl.records import to_section
from omni_rollout.integrations.verl.trainer import OmniTrainer, WatchedReplayBuffer

SECTION = TrainConfig(reward=RewardConfig(weights={}))
SECTION.model.path = SECTION.prompts = SECTION.run_dir = "none"


def _make_mock_platform(name: str = "mock_xpu") -> type[CpuPlatform]:
    """verl's tests want the name that they give."""
    return type(f"Cpu_{name}", (CpuPlatform,), {"device_name": property(lambda _: name)})


class ReplayBuffer(WatchedReplayBuffer):
    agent_loop: Any = SimpleNamespace(wait=time.sleep)  # one that makes nothing, and that nothing goes wrong in


class Worker(TrainerRank):
    def __init__(self, *_: Any, **__: Any) -> None:  # verl's has nothing to configure
        super().__init__(to_section(SECTION))


PPOTrainer = OmniTrainer


def _nothing(*_: Any, **__: Any) -> None: ...


def _drops_a_group(self: WatchedReplayBuffer, *args: Any, **kwargs: Any) -> Any:
    uids, *rest = super(WatchedReplayBuffer, self)._select_prompt_uids(*args, **kwargs)
    return uids[1:], *rest


DEFECTS: dict[str, Callable[[], None]] = {
    "the platform never stands in": lambda: setattr(CpuPlatform, "is_platform_available", lambda *_, **__: False),
    "the platform has no resource name": lambda: setattr(CpuPlatform, "ray_resource_name", _nothing),
    "the buffer drops a group": lambda: setattr(WatchedReplayBuffer, "_select_prompt_uids", _drops_a_group),
    "the trainer never stops the profiler": lambda: setattr(OmniTrainer, "_stop_profiling", _nothing),
    "the rank does not start as verl's": lambda: setattr(TrainerRank, "__init__", _nothing),
}

ROW = tomllib.loads(Path(__file__).with_name("table.toml").read_text())[os.environ["SUBSTITUTE"]]
NAME, DIFFERS = ROW["name"], ROW.get("differs", {})
OURS = globals()[NAME]
if "PLANTED" in os.environ:
    DEFECTS[os.environ["PLANTED"]]()
if "at" in ROW:
    setattr(importlib.import_module(ROW["at"]), NAME, OURS)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if "at" not in ROW:
            setattr(item.module, NAME, OURS)
        assert getattr(item.module, NAME) is OURS, f"{item.module.__name__} had taken verl's {NAME} before"
        if item.originalname in DIFFERS:
            item.add_marker(pytest.mark.xfail(reason=DIFFERS[item.originalname], strict=True))
    assert set(DIFFERS) <= {item.originalname for item in items}, "the table names tests that verl does not have"
