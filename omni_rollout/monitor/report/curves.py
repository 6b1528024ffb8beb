"""Reward against guards, parity, learning, and time: what the figures of the steps say."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from statistics import fmean

from omni_rollout.monitor.heatmap import heat_map
from omni_rollout.monitor.metrics import timestep_gaps
from omni_rollout.monitor.pairs import PPO_KL_COMPARES
from omni_rollout.monitor.report.charts import BARS, Points, Series, line_chart, sentence, stacked_bars, table
from omni_rollout.monitor.report.read import Run
from omni_rollout.monitor.verdict import HELD_OUT

GUARD = "guard/"
DISTANCES = ("guard/start_distance", "guard/start_colour_distance")  # shares of full scale, 0 at the start
TIMES, WHOLE = "timing_s/", "timing_s/step"
HIGHEST = 200.0  # percent: a share that was nearly 0 at the start would hide all other lines
_LARGEST = {"largest |KL| per element": "parity/ppo_kl_mb0", "largest gap, in clip ranges": "parity/over_clip"}
CLIPPED = {"actor/pg_clipfrac": "all", "actor/pg_clipfrac_higher": "above", "actor/pg_clipfrac_lower": "below"}
MEANINGS = (
    "sharpness: mean absolute Laplacian of brightness; contrast: its standard deviation; colour_entropy: bits of the histogram "
    "of 15 colours; dark_share: pixels below a quarter of full brightness; diversity: how far images of one prompt are from "
    "each other; start_distance, start_colour_distance: how far an image is from the starting policy's of the same seed, in "
    "pixels and in shares of colours. A guard is worse where it changed by 3 standard errors and a fifth; a distance, where it "
    "is that certainly above what the start's images of one prompt differ by."
)
HEALTH = {
    "actor/grad_norm": "Gradient norm before clipping (largest of a step)",
    "actor/drift": "Drift of the weights from the start (relative)",
    "actor/lr": "Learning rate",
    "actor/ratio_mean": "Mean ratio (1: not moved)",
    "actor/ref_kl": "KL to the starting policy",
    "critic/rewards/zero_std_ratio": "Groups of equal rewards, which teach nothing (share)",
}


def guards(run: Run) -> str:
    names = _names(run, GUARD)
    if not names:
        return sentence("no guards were measured: they are part of every evaluation, and this run has none")
    keys = [HELD_OUT, *(name for name in names if name != HELD_OUT)]
    lines = {key: (percent if key in DISTANCES else relative)(run.points(key)) for key in keys}
    series = [
        Series(name=key.partition("/")[2], points=points, colour=number, strong=key == HELD_OUT)
        for number, (key, points) in enumerate(lines.items())
    ]
    rows = []
    for key in keys:
        values = [(step, value) for step, value in run.points(key) if value is not None]
        if values:
            rows.append([key, *(f"{value:.4g} (step {step})" for step, value in (values[0], values[-1]))])
    lost = [f"step {line['step']}: {line['guard/lost']}" for line in run.lines if "guard/lost" in line]
    told = "".join(sentence(f"Worse while the reward rose, {each}") for each in lost)
    none = sentence("At no evaluation did a guard fall beyond its noise while the reward rose.")
    chart = line_chart("Change since the first evaluation", series, unit="%")
    axis = (
        f"One axis for all: percent of the value at the first evaluation, cut at {HIGHEST:g} %; of the distances from the "
        "start's images, percent of the largest there can be. A rising dark_share or distance is a loss, and so is a fall of "
        f"any other. {MEANINGS}"
    )
    return f'{told or none}<div class="charts">{chart}</div>{sentence(axis)}{table(["", "first", "last"], rows)}'


def relative(points: Points) -> list[tuple[int, float | None]]:
    """Change since the first finite value, percent of its size; empty where that is 0, or nothing follows."""
    start = next((value for _, value in points if value is not None), None)
    if not start or len(points) < 2:
        return []
    return [
        (step, None if value is None else max(min(100 * (value - start) / abs(start), HIGHEST), -HIGHEST))
        for step, value in points
    ]


def percent(points: Points) -> list[tuple[int, float | None]]:
    return [(step, None if value is None else 100 * value) for step, value in points]


def parity(run: Run) -> str:
    gaps = [
        (line["step"], found)
        for line in run.lines
        if (found := timestep_gaps({key: float("nan") if value is None else value for key, value in line.items()}))
    ]
    if not gaps:
        notes = (line[PPO_KL_COMPARES] for line in run.lines if PPO_KL_COMPARES in line)
        return sentence(f"Engine against trainer: {next(notes, 'no step logged the gap of a log-prob')}.") + _weights(run)
    clip_range = run.config.get("trainer.clip_range")
    file = io.BytesIO()
    picture = heat_map(gaps, clip_range if isinstance(clip_range, float) and clip_range > 0 else 1.0)
    picture.save(file, "PNG")
    cells = [gap for _, row in gaps for gap in row.values()]
    worst = max(cells, key=lambda gap: math.inf if math.isnan(gap) else gap)
    exact = not any(cells) and all(share == 1 for share in run.numbers("parity/bitwise_equal_fraction"))
    if exact:
        told = f"All {len(cells)} cells of {len(gaps)} steps are exactly 0: engine and trainer gave the same bits."
    else:
        told = f"Engine and trainer differ: the largest mean gap of a cell is {worst:.2g} per element of a log-prob."
    rows = [[name, f"{max(map(abs, numbers)):.3g}"] for name, key in _LARGEST.items() if (numbers := run.numbers(key))]
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return (
        f'<p class="{"good" if exact else "bad"} verdict">{escape(told)}</p><div class="scroll">'
        f'<img class="map" src="{source}" alt="{escape(told)}" width="{picture.width}"></div>{table([], rows)}{_weights(run)}'
    )


def _weights(run: Run) -> str:
    equal = run.numbers("parity/weights_equal")
    held = sum(one == 1 for one in equal)
    return sentence(f"Weights of engine and trainer were proven equal in {held} of {len(equal)} steps.") if equal else ""


def health(run: Run) -> str:
    clipped = [Series(name=name, points=run.points(key), colour=number) for number, (key, name) in enumerate(CLIPPED.items())]
    charts = [line_chart("Ratios clipped (share)", clipped)]
    charts += [line_chart(title, [Series(name=title, points=run.points(key))]) for key, title in HEALTH.items()]
    if not any(charts):
        return sentence("no update was logged")
    skipped = sum(run.numbers("actor/skipped_updates"))
    told = sentence(f"{skipped:.0f} updates were skipped, for their gradients were not finite.") if skipped else ""
    return f'{told}<div class="charts">{"".join(charts)}</div>'


def times(run: Run) -> str:
    lines = [line for line in run.lines if line.get(WHOLE) is not None]
    if not lines:
        return sentence("no step was timed")
    stages = [name for name in _names(run, TIMES) if name != WHOLE]
    steps = []
    for line in lines:
        values = [line.get(stage) or 0.0 for stage in stages]
        steps.append((line["step"], [*values, max(line[WHOLE] - sum(values), 0.0)]))
    names = [*(stage.removeprefix(TIMES) for stage in stages), "the rest"]
    totals = [sum(values[number] for _, values in steps) for number in range(len(names))]
    whole = sum(totals) or 1.0
    order = [number for number in range(len(names)) if totals[number] / whole >= 0.001]  # less cannot be seen
    rows = [[names[n], f"{totals[n]:.1f}", f"{totals[n] / len(steps):.2f}", f"{totals[n] / whole:.1%}"] for n in order]
    speed = run.numbers("perf/throughput")
    told = f"{whole / 60:.1f} min in {len(steps)} steps" + (f", {fmean(speed):.2f} images a second" if speed else "")
    size = -(-len(steps) // BARS)
    bars = []
    for place in range(0, len(steps), size):
        part = steps[place : place + size]
        label = f"step {part[0][0]}" + (f" to {part[-1][0]}" if len(part) > 1 else "")
        bars.append((label, [fmean(values[number] for _, values in part) for number in order]))
    chart = stacked_bars("Seconds a step", [names[number] for number in order], bars, "s")
    note = "Evaluations, checkpoints and the start are not in these figures."
    return (
        sentence(f"{told}. {note}")
        + f'<div class="charts">{chart}</div>'
        + table(["stage", "s in all", "s a step", "share"], rows)
    )


def _names(run: Run, prefix: str) -> list[str]:
    """Numeric metrics that begin like this, in the order of their first line."""
    found = ((key, value) for line in run.lines for key, value in line.items() if key.startswith(prefix))
    return list(dict.fromkeys(key for key, value in found if not isinstance(value, str)))
