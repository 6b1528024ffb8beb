"""Rolls out and recomputes under frozen weights, cell by cell; then says what differs first and what each cause costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion.self_check import attention_shape
from omni_rollout.errors import UserError
from omni_rollout.launch.progress import Progress
from omni_rollout.models import family_module
from omni_rollout.models.base.causes import Setting
from omni_rollout.parity.attribution import LORA, Attribution, CauseResult, culprits
from omni_rollout.parity.causes import causes
from omni_rollout.parity.findings import Finding, from_encodings, from_seeds, from_trace, from_weights
from omni_rollout.parity.matrix import NATURAL, STAGGERED, Cell, Matrix, cells, renamed, requests, submissions
from omni_rollout.parity.measure import measure, measure_steps
from omni_rollout.parity.results import CellResult, Report, environment
from omni_rollout.parity.trace import differing_weights, trace
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.run.restore import put_into, restored_policy
from omni_rollout.run.source import Source
from omni_rollout.types import RolloutRequest, Trajectory

# Guidance runs both branches; at one width the trainer's batch holds what the engine ran alone. fp32: a second a pass.
TRUE_WIDTH = Matrix(guidance=(4.0,), width=("64",), in_flight=("1", "3"), images=3)
BuildRandom = Callable[..., object]  # `nano.random_weights.build_random`, which stands to the right of this room
LORA_RANK = 4  # of the adapter that both sides are given, where the config trains full weights


class Probe:
    """One engine and one policy that should agree.

    Args:
        config: its `model.path` gives the tokenizer and the schedule.
        name: what results call the model; its path, if nothing else is given.
    """

    def __init__(self, engine: RolloutEngine, policy: torch.nn.Module, config: TrainConfig, name: str | None = None) -> None:
        model = config.model
        self.name = name or model.path
        self.engine, self.policy, self.config = engine, policy, config
        self.dtype: torch.dtype = getattr(torch, engine.dtype)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model.path, subfolder="tokenizer")
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(model.path, subfolder="scheduler")
        self._micro_batch_size = config.trainer.micro_batch_size
        self._count = 0

    def requests(self, cell: Cell, images: int) -> list[RolloutRequest]:
        self._count += 1
        found = requests(cell, self.config.sampling, self.config.model.family, self.tokenizer, images)
        return [renamed(request, str(self._count)) for request in found]

    def recompute(self, trajectories: Sequence[Trajectory]) -> list[torch.Tensor]:
        return recompute(
            self.policy,
            trajectories,
            family=self.config.model.family,
            dtype=self.dtype,
            micro_batch_size=self._micro_batch_size,
        )

    def cell(self, cell: Cell, images: int) -> CellResult:
        trajectories: list[Trajectory] = []
        errors: list[str] = []
        for portion in submissions(cell, self.requests(cell, images)):
            trajectories += self.engine.generate(
                portion, on_error=lambda request, error: errors.append(f"{request.request_id}: {error}")
            )
        clip_range = self.config.trainer.clip_range
        log_probs = self.recompute(trajectories) if trajectories else []
        return CellResult(
            model=self.name,
            cell=cell,
            measure=measure(trajectories, log_probs, clip_range) if trajectories else None,
            steps=measure_steps(trajectories, log_probs, clip_range),
            batch_sizes=tuple(sorted({size for t in trajectories for size in t.fingerprint["batch_sizes"]})),
            widths=tuple(sorted({t.spec.prompt_width for t in trajectories})),
            errors=tuple(errors),
            findings=(*from_seeds(trajectories), *from_encodings(trajectories)),
        )

    def weights(self) -> list[Finding]:
        return from_weights(differing_weights(self.engine, self.policy, self.dtype))

    def first_difference(self, request: RolloutRequest) -> Finding | None:
        """The first difference in one image, sampled alone."""
        try:
            found = trace(self.engine, self.policy, request, self.config.model.family, self.dtype)
        except ExceptionGroup as group:
            return Finding("engine", request.request_id, f"the request failed: {group.exceptions[0]}")
        schedule = family_module(self.config.model.family, "spec").schedule
        return from_trace(found, schedule(found.trajectory.spec, self.scheduler.config))

    def first_differences(self, matrix: Matrix, results: Sequence[CellResult]) -> list[Finding]:
        """Weights, then one image of every guidance and width, and of each kind of cell that was not exact."""
        found = self.weights()
        chosen = {(result.cell.guidance, result.cell.width): result for result in results}
        for guidance, width in chosen:
            cell = Cell(dtype=self.engine.dtype, guidance=guidance, width=width, in_flight="1")
            request = renamed(self.requests(cell, 1)[0], "traced")
            difference = self.first_difference(request)
            if difference is not None:
                found.append(difference)
        exact = all(result.exact for result in results)
        if not exact and not found and not any(result.errors or result.findings for result in results):
            found.append(
                Finding("batch", "in flight", "each image agrees when it is sampled alone: what differs is its company")
            )
        return list(dict.fromkeys(found))


def probe(
    config: TrainConfig,
    matrix: Matrix,
    progress: Progress,
    build_random: BuildRandom | None = None,
    source: Source | None = None,
) -> Report:
    """Starts one engine per dtype and runs the whole matrix in it.

    Args:
        source: a checkpoint whose weights both sides are given.
        build_random: writes a random model: the one to be measured where the config has no `model.path`, and one of the true
            width, to be measured too where the matrix wants that and the other is narrower.
    """
    if not config.model.path and build_random is not None:
        family = config.model.family
        with tempfile.TemporaryDirectory() as folder:
            progress.stage(f"no model.path: making a random {family}")
            build_random(Path(folder), family=family)
            made = replace(config, model=replace(config.model, path=folder))
            return _probe(made, matrix, progress, build_random, f"a random {family}")
    return _probe(config, matrix, progress, build_random, config.model.path if source is None else source.name, source)


def _probe(
    config: TrainConfig,
    matrix: Matrix,
    progress: Progress,
    build_random: BuildRandom | None,
    name: str,
    source: Source | None = None,
) -> Report:
    if config.sampling.sde_type.value == "ode" or config.sampling.noise_level == 0:
        raise UserError("an ode has no log-probs to compare: choose sampling.sde_type=sde and a noise_level above 0")
    report = Report(model=name, parity=config.parity.value, clip_range=config.trainer.clip_range, environment={})
    width = 0
    for dtype in matrix.dtype:
        progress.stage(f"{dtype}: loading the model into the engine and the trainer")
        with _both_sides(config, dtype, matrix.images, name, source) as sides:
            heads, head_dim = attention_shape(sides.policy)
            width = heads * head_dim
            _probe_dtype(sides, matrix, report, progress)
    true_width = prod(family_module(config.model.family, "probe").TRUE_WIDTH)
    if matrix.true_width and build_random is not None and width < true_width:
        _probe_true_width(config, matrix, report, progress, build_random)
    return report


@contextmanager
def _both_sides(config: TrainConfig, dtype: str, places: int, name: str, source: Source | None = None) -> Iterator[Probe]:
    model, parity = config.model, config.parity.value
    with RolloutEngine(model.path, family=model.family, dtype=dtype, max_num_seqs=places, parity=parity) as engine:
        if source is not None:
            put_into(engine, config, source)
        yield Probe(engine, restored_policy(config, source, dtype), config, name)


def _probe_dtype(sides: Probe, matrix: Matrix, report: Report, progress: Progress) -> None:
    dtype = sides.engine.dtype
    report.environment = report.environment or environment(sides.engine)
    results = _cells(sides, matrix, report, progress)
    progress.stage(f"{dtype}: looking for a first difference")
    differences = sides.first_differences(matrix, results)
    if matrix.causes:
        differences += _causes(sides, matrix, report, progress)
    report.findings += [(dtype, finding) for finding in differences]


def _cells(sides: Probe, matrix: Matrix, report: Report, progress: Progress, where: str = "") -> list[CellResult]:
    dtype = sides.engine.dtype
    results: list[CellResult] = []
    whole = list(cells(matrix, dtype))
    progress.stage(f"{where}{dtype}: sampling and recomputing", len(whole), "cells")
    for cell in progress.track(whole):
        results.append(sides.cell(cell, matrix.images))
        kl = results[-1].measure.kl if results[-1].measure else float("nan")
        told = f"guidance {cell.guidance}, width {cell.width}, in flight {cell.in_flight}, KL {kl:.3g}"
        progress.describe(f"{where}{dtype}: {told}")
    report.cells += results
    return results


def _probe_true_width(
    config: TrainConfig, matrix: Matrix, report: Report, progress: Progress, build_random: BuildRandom
) -> None:
    """One block of the published model's width with random weights, in each expert: kernels are chosen by size."""
    family = config.model.family
    own = family_module(family, "probe")
    heads, head_dim = own.TRUE_WIDTH
    name = f"one random block of {heads} x {head_dim}"
    small = replace(TRUE_WIDTH, dtype=matrix.dtype, causes=matrix.causes)
    with tempfile.TemporaryDirectory() as folder:
        progress.stage(f"{name}: making it")
        build_random(Path(folder), family=family, layers=1, heads=heads, head_dim=head_dim)
        sampling = replace(config.sampling, height=64, width=64, num_inference_steps=own.TRUE_WIDTH_STEPS)
        wide = replace(config, model=replace(config.model, path=folder), sampling=sampling)
        for dtype in small.dtype:
            progress.stage(f"{name}, {dtype}: loading it into the engine and the trainer")
            with _both_sides(wide, dtype, small.images, name) as sides:
                results = _cells(sides, small, report, progress, f"{name}, ")
                if not all(result.exact for result in results):
                    report.findings += [(dtype, finding) for finding in sides.first_differences(small, results)]
                elif small.causes:
                    report.causes.append(_constant_shape(sides, small))


def _constant_shape(sides: Probe, matrix: Matrix) -> CauseResult:
    """What it would cost to multiply rows as they come, which is what the width decides."""
    cell = Cell(dtype=sides.engine.dtype, guidance=max(matrix.guidance), width="64", in_flight=str(matrix.images))
    trajectories = list(sides.engine.generate(sides.requests(cell, matrix.images)))
    setting = Setting(sides.policy, sides.config.model.family, sides.dtype)
    attribution = Attribution(setting, sides.name, sides.engine.dtype, sides.config.trainer.clip_range)
    return attribution.cause("constant_shape", trajectories)


def _causes(sides: Probe, matrix: Matrix, report: Report, progress: Progress) -> list[Finding]:
    """Measured on guided, padded and unpadded images together, so that each rule has something to break."""
    engine, config, dtype = sides.engine, sides.config, sides.engine.dtype
    guidance = max(matrix.guidance)
    padded = min((width for width in matrix.width if width != NATURAL), key=int, default="64")

    progress.stage(f"{dtype}: breaking each rule in turn", len(causes(sides.config.model.family)), "rules")

    def images() -> list[RolloutRequest]:
        chosen = [Cell(dtype=dtype, guidance=guidance, width=width, in_flight=STAGGERED) for width in (NATURAL, padded)]
        return [request for cell in chosen for request in sides.requests(cell, max(2, matrix.images // 2))]

    trajectories = list(
        engine.generate(images(), on_error=lambda request, error: progress.say(f"{request.request_id}: {error}"))
    )
    if not trajectories:
        return []
    setting = Setting(sides.policy, config.model.family, sides.dtype)
    attribution = Attribution(setting, sides.name, dtype, config.trainer.clip_range, compiled=matrix.compile)
    baseline = attribution.score(trajectories)
    report.baselines[dtype] = baseline
    results = attribution.causes(trajectories, progress.track)
    found = culprits(baseline, results)
    if baseline.exact:
        progress.stage(f"{dtype}: the same with an adapter")
        results.append(attribution.lora(engine, images(), config.trainer.lora_rank or LORA_RANK))
    else:
        results.append(
            CauseResult(model=sides.name, cause=LORA, dtype=dtype, not_run="the two sides differ before an adapter is added")
        )
    report.causes += results
    return found
