"""What `parity` found, and on what."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from omni_rollout.parity.attribution import CauseResult
from omni_rollout.parity.findings import Finding
from omni_rollout.parity.matrix import Cell
from omni_rollout.parity.measure import Measure
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.rollout.records import package_versions


@dataclass(frozen=True, kw_only=True)
class CellResult:
    model: str
    cell: Cell
    measure: Measure | None  # None: no image came out
    steps: dict[int, Measure]
    batch_sizes: tuple[int, ...]  # that its images met in the engine's forward passes
    widths: tuple[int, ...]
    errors: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        return not self.errors and not self.findings and self.measure is not None and self.measure.exact


@dataclass(kw_only=True)
class Report:
    model: str
    parity: str
    clip_range: float
    environment: dict[str, Any]
    cells: list[CellResult] = field(default_factory=list)
    causes: list[CauseResult] = field(default_factory=list)
    baselines: dict[str, Measure] = field(default_factory=dict)  # dtype -> the causes' trajectories with nothing broken
    findings: list[tuple[str, Finding]] = field(default_factory=list)  # with the dtype; first differences

    @property
    def exact(self) -> bool:
        """Same bits in every cell, and nothing found by the traces that the KL may hide."""
        return bool(self.cells) and all(result.exact for result in self.cells) and not self.findings


def environment(engine: RolloutEngine) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.processor()}".strip(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "weights": engine.weights_digest,
        "cores": os.cpu_count(),
    }
