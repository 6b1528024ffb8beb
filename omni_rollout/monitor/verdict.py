"""What a run came to, in three lines, from its metrics alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Line = Mapping[str, Any]  # of metrics.jsonl
TRAINED, HELD_OUT = "critic/rewards/mean", "evaluation/reward"
NORMAL_95, CHANCE = 1.96, 0.05  # standard errors, and p, from which on a difference is believed
BELIEVED = 2.0  # standard errors of a difference from which on it is called one


def read_metrics(path: Path) -> Iterator[Line]:
    """The lines of a metrics.jsonl."""
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def verdict(lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """(name, sentence) of the training reward, the held-out reward and parity, as far as there are figures."""
    steps = [line for line in lines if line.get(TRAINED) is not None]
    if len(steps) > 1:
        yield "reward", _trained([line[TRAINED] for line in steps])
    held_out = [line for line in lines if line.get(HELD_OUT) is not None]
    if len(held_out) > 1:
        yield "held-out", _held_out(held_out[0], held_out[-1])
    compared = [line for line in lines if line.get("parity/bitwise_equal_fraction") is not None]
    if compared:
        held = sum(line["parity/bitwise_equal_fraction"] == 1.0 for line in compared)
        yield "parity", f"engine and trainer agreed bit for bit in {held} of {len(compared)} steps"


def paired(pairs: Sequence[tuple[float, float]]) -> str:
    """Before against after of the same images (prompt and seed), so what differs between images is no noise; 95 % interval.

    Called no more than chance where the interval holds 0, or where the sign test, which asks for no normal distribution, has a
    p above 0.05: few images that changed make the interval too narrow.
    """
    changes = [after - before for before, after in pairs]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    told, p = f"{fmean(changes):+.3f}", _sign_test(better, worse)
    if len(changes) > 1:
        half = NORMAL_95 * stdev(changes) / math.sqrt(len(changes))
        told += f", 95 % interval {fmean(changes) - half:+.3f} to {fmean(changes) + half:+.3f}"
        told += ", no more than chance" if abs(fmean(changes)) <= half or p > CHANCE else ""
    equal = len(changes) - better - worse
    return f"{told}; better in {better}, worse in {worse}, equal in {equal} of {len(changes)} images (sign test p = {p:.2g})"


def _sign_test(better: int, worse: int) -> float:
    """Chance of a split at least as uneven where better and worse are equally likely, both sides; exact."""
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)


def _trained(rewards: Sequence[float]) -> str:
    """First tenth against last tenth, for a single step has prompts of its own."""
    part = max(1, len(rewards) // 10)
    first, last = rewards[:part], rewards[-part:]
    of = "step" if part == 1 else f"{part} steps"
    told = f"{fmean(first):.3f} -> {fmean(last):.3f} in training, first against last {of} of {len(rewards)}"
    if part == 1:
        return f"{told}: too few to tell"
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(part)
    return f"{told}: {_difference(fmean(last) - fmean(first), error)}"


def _held_out(before: Line, after: Line) -> str:
    error = math.hypot(before.get("evaluation/reward_se") or 0.0, after.get("evaluation/reward_se") or 0.0)
    told = f"{before[HELD_OUT]:.3f} -> {after[HELD_OUT]:.3f}, step {before['step']} against step {after['step']}"
    others = [
        f"{key.removeprefix('evaluation/')} {before[key]:.3f} -> {after[key]:.3f}"
        for key in before
        if key.startswith("evaluation/") and not key.startswith(HELD_OUT) and None not in (before[key], after.get(key))
    ]
    return "; ".join([f"{told}: {_difference(after[HELD_OUT] - before[HELD_OUT], error)}", *others])


def _difference(difference: float, error: float) -> str:
    """`+0.130 +- 0.021`, and whether that is more than chance."""
    chance = "" if abs(difference) > BELIEVED * error else ", no more than chance"
    return f"{difference:+.3f} +- {error:.3f} (standard error){chance}"
