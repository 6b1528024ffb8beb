"""`omni-rollout parity` and `omni-rollout replay`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from omni_rollout.config import TrainConfig
from omni_rollout.launch.progress import Progress
from omni_rollout.parity.html import write_html
from omni_rollout.parity.matrix import Matrix
from omni_rollout.parity.probe import BuildRandom, probe
from omni_rollout.parity.replay import Replayed, replay_capsules
from omni_rollout.parity.report import numbers, print_report, to_json, write_json
from omni_rollout.run.source import Source


def parity(
    config: TrainConfig,
    *,
    json_path: Path | None = None,
    html_path: Path | None = None,
    matrix: Matrix | None = None,
    progress: Progress | None = None,
    build_random: BuildRandom | None = None,
    source: Source | None = None,
) -> int:
    """Runs the matrix and reports it, on stdout; `progress`, which it ends before that, is told of every result.

    Args:
        config: without a `model.path` a small random model of the family stands for it.
        build_random, source: see `probe`.

    Returns:
        0 when the KL is exactly 0 with equal bits in every cell and no trace found a difference, else 1.
    """
    _use_threads(config)
    console = Console(width=None if sys.stdout.isatty() else 160)  # in a file, a table need not fit a terminal
    progress = progress or Progress(shown=False)
    report = probe(config, matrix or Matrix(), progress, build_random, source)
    progress.close()
    if json_path is not None:
        write_json(to_json(report), json_path)
    if html_path is not None:
        write_html(report, html_path)
    print_report(report, console)
    return 0 if report.exact else 1


def replay(
    capsules: Sequence[Path],
    config: TrainConfig,
    *,
    json_path: Path | None = None,
    progress: Progress | None = None,
    source: Source | None = None,
) -> int:
    """Scores each capsule with the model at `config.model.path`, or with a checkpoint; ends `progress` before it reports.

    Returns:
        0: every capsule holds bit for bit; 1: one does not, or was refused; otherwise some are of another machine, and 3: their
        gaps are within what rounding explains; 4: one is not.
    """
    _use_threads(config)
    progress = progress or Progress(shown=False)
    progress.stage("loading the model and scoring", len(capsules), "capsules")
    results = replay_capsules(config, progress.track(capsules), source)
    progress.close()
    if json_path is not None:
        write_json({"capsules": [_capsule(result) for result in results]}, json_path)
    console = Console(soft_wrap=True)
    for line in _lines(results):
        console.print(line, markup=False, highlight=False)
    for told in _sampled_by_others(results):
        console.print(told, markup=False, highlight=False)
    held = sum(result.holds for result in results)
    console.print(f"{held} of {len(results)} capsules hold bit for bit", markup=False, highlight=False)
    if others := {result.status for result in results} - {"equal"}:
        return 1 if others & {"different", "refused"} else 4 if "outside" in others else 3
    return 0 if results else 1


def _sampled_by_others(results: Sequence[Replayed]) -> Iterator[str]:
    """Once for each run and policy version: which weights these capsules ask for, and how to give them."""
    others = [(result.other_version, _run_of(result.path)) for result in results if result.other_version is not None]
    for (version, run), number in sorted(Counter(others).items(), key=str):
        told = f"{number} capsules were sampled with other weights than these, after step {version} of their run"
        step = f"checkpoints/step_{version:05d}"
        if not version:
            yield f"{told}: give the model that the run started from"
        elif run is None or (run / step).is_dir():
            yield f"{told}: give checkpoint={'RUN' if run is None else run}/{step}"
        else:
            keeps = "trainer.save_every=1 keeps them, the newest trainer.keep_checkpoints of them"
            yield f"{told}: those were not kept, there is no {run / step}; {keeps}"


def _run_of(capsule: Path) -> Path | None:
    """The run folder that a capsule lies in, as `trajectories.journal` lays it down; None: it lies elsewhere."""
    folder = capsule.parent
    return folder.parent.parent if folder.name.startswith("step_") and folder.parent.name == "rollout" else None


def _lines(results: Sequence[Replayed]) -> Iterator[str]:
    """One for each capsule; those in a row that differ for the same reason, such as other weights, are told together."""
    for reason, group in groupby(results, lambda result: result.not_honoured if result.status == "different" else ()):
        together = list(group)
        if not reason or len(together) == 1:
            yield from map(_line, together)
            continue
        measures = [result.measure for result in together if result.measure is not None]
        gap, kl = max(measure.max_abs_diff for measure in measures), max((measure.kl for measure in measures), key=abs)
        which = f"{len(together)} capsules, from {together[0].path} to {together[-1].path}"
        yield f"different  {which}: by up to {gap:.3g}, KL up to {kl:.3g}; not honoured: {', '.join(reason)}"


def _line(result: Replayed) -> str:
    if result.measure is None:
        reason = str(result.refused)
        return f"refused    {reason}" if reason.startswith(str(result.path)) else f"refused    {result.path}: {reason}"
    notes = f"; not honoured: {', '.join(result.not_honoured)}" if result.not_honoured else ""
    if result.holds:
        return f"equal      {result.path}: {result.measure.log_probs} log-probs{notes}"
    if result.other_machine:
        gap = f"largest gap {result.measure.max_abs_diff:.3g}, {result.status} what rounding explains"
        other = f"another machine: {', '.join(result.other_machine)}; {gap} (up to {result.explained:.3g} here)"
        return f"{result.status:<9}  {result.path}: {other}{notes}"
    return f"different  {result.path}: by up to {result.measure.max_abs_diff:.3g}, KL {result.measure.kl:.3g}{notes}"


def _capsule(result: Replayed) -> dict[str, object]:
    return {
        "path": str(result.path),
        "status": result.status,
        "refused": result.refused,
        "not_honoured": list(result.not_honoured),
        "other_machine": list(result.other_machine),
        "explained": result.explained if result.other_machine else None,
        **numbers(result.measure),
    }


def _use_threads(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
