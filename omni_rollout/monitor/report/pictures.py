"""The same prompts and seeds, evaluation by evaluation: the best, the worst, and those that look hacked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from PIL import Image

from omni_rollout.monitor.hacking import BAD, MATERIAL
from omni_rollout.monitor.monitor import EVALUATION, ON_SHEET
from omni_rollout.monitor.report.charts import sentence
from omni_rollout.monitor.report.read import Run, Score
from omni_rollout.trajectories.sheet import cut

MOMENTS, SHOWN, OTHERS = 6, 4, 24  # evaluations of a strip, strips of a kind, and strips of the rest, at most
SIDE, SMALL = 256, 160  # pixels of the longer side; small pictures stay PNG, whose pixels are the model's
SHEET = 1200

Strips = Mapping[int, list[Image.Image]]  # step -> images


def section(run: Run) -> str:
    sheets = {
        step: path for path in sorted((run.folder / "images").glob(f"{EVALUATION}_*.png")) if (step := _step(path)) is not None
    }
    if not sheets:
        return sentence("no pictures of an evaluation lie in images/: with evaluation.images=N the run keeps some")
    pictures, problems = _pictures(run, sheets)
    told = "".join(map(sentence, problems))
    if len(pictures) < 2:
        steps = sorted({min(sheets), max(sheets)})
        told += sentence("To compare image by image, two evaluations with scores (evaluation.jsonl) are needed; as kept:")
        return told + "".join(_sheet(step, sheets[step]) for step in steps)
    return told + "".join(_strips(run, pictures))


def _strips(run: Run, pictures: Strips) -> Iterator[str]:
    scores = {step: run.scores[step] for step in pictures}
    first, last = scores[min(scores)], scores[max(scores)]
    count = min(len(images) for images in pictures.values())
    change = {index: _change(first[index], last[index]) for index in range(count)}
    known = sorted((index for index in change if change[index] is not None), key=lambda index: change[index] or 0.0)
    best = [index for index in reversed(known) if (change[index] or 0) > 0][:SHOWN]
    worst = [index for index in known if (change[index] or 0) < 0][:SHOWN]
    suspects = suspicious(first, last, count)[:SHOWN]
    of = f"the first {count} of {len(first)} images" if count < len(first) else f"{count} images"
    yield sentence(f"{of}, the same prompts and seeds at every evaluation; below each the step and its reward.")
    kinds = [
        ("Best: largest gain", best, "no image gained"),
        ("Worst: largest loss", worst, "no image lost"),
        (
            "Suspects: the reward rose, and a guard got worst",
            suspects,
            f"none: no image gained while a guard got worse by {MATERIAL:.0%} of its mean at the start",
        ),
    ]
    for title, chosen, none in kinds:
        yield f"<h3>{escape(title)}</h3>"
        yield "".join(_strip(index, pictures, scores) for index in chosen) if chosen else sentence(none)
    rest = [index for index in range(count) if index not in {*best, *worst, *suspects}][:OTHERS]
    if rest:
        strips = "".join(_strip(index, pictures, scores) for index in rest)
        yield f"<details><summary>{len(rest)} of the others</summary>{strips}</details>"


def suspicious(first: Mapping[int, Score], last: Mapping[int, Score], count: int) -> list[int]:
    """Images whose reward rose while a guard lost a fifth of the start's mean, by gain times loss, the largest first."""
    found = {}
    for index in range(count):
        gain, (loss, _) = _change(first[index], last[index]) or 0.0, largest_loss(first, last, index)
        if gain > 0 and loss > MATERIAL:
            found[index] = gain * loss
    return sorted(found, key=found.__getitem__, reverse=True)


def largest_loss(first: Mapping[int, Score], last: Mapping[int, Score], index: int) -> tuple[float, str]:
    """(loss of the guard that lost most, as a share of its mean over the first evaluation; its name)."""
    losses = [(0.0, "")]
    for name, value in first[index].guards.items():
        values = [score.guards[name] for score in first.values() if name in score.guards]
        mean = abs(sum(values) / len(values))
        if name in BAD and name in last[index].guards and mean > 0:
            losses.append((BAD[name] * (last[index].guards[name] - value) / mean, name))
    return max(losses)


def _change(before: Score, after: Score) -> float | None:
    return None if before.reward is None or after.reward is None else after.reward - before.reward


def _strip(index: int, pictures: Strips, scores: Mapping[int, Mapping[int, Score]]) -> str:
    steps = sorted(pictures)
    first, last = scores[steps[0]], scores[steps[-1]]
    change, (loss, guard) = _change(first[index], last[index]), largest_loss(first, last, index)
    frames = []
    for step in steps:
        reward = scores[step][index].reward
        words = ("before: " if step == 0 else f"step {step}: ") + ("not scored" if reward is None else f"{reward:.3g}")
        if step == steps[-1] and change is not None:
            lost = f"; {guard} worse by {loss:.0%}" if loss > MATERIAL else ""
            words += f" ({change:+.3g}{lost})"
        picture = f'<img src="{data_uri(pictures[step][index])}" alt="{escape(f"image {index}, {words}")}">'
        frames.append(f"<figure>{picture}<figcaption>{escape(words)}</figcaption></figure>")
    prompt = escape(f"{index}: {scores[steps[-1]][index].prompt}")
    return f'<div class="strip"><p>{prompt}</p><div class="frames">{"".join(frames)}</div></div>'


def _pictures(run: Run, sheets: Mapping[int, Path]) -> tuple[Strips, list[str]]:
    """The images of the evaluations whose scores are whole, and what could not be read."""
    steps = [step for step in sorted(sheets) if _whole(run.scores.get(step, {}))]
    if len(steps) > MOMENTS:
        steps = [steps[round(place * (len(steps) - 1) / (MOMENTS - 1))] for place in range(MOMENTS)]
    pictures, problems = {}, []
    for step in steps:
        try:
            with Image.open(sheets[step], formats=["PNG"]) as sheet:
                pictures[step] = cut(sheet.convert("RGB"), min(len(run.scores[step]), ON_SHEET))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{sheets[step].name} cannot be used: {error}")
    return pictures, problems


def _whole(scores: Mapping[int, Score]) -> bool:
    return bool(scores) and set(scores) == set(range(len(scores)))


def _step(path: Path) -> int | None:
    digits = path.stem.removeprefix(f"{EVALUATION}_")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _sheet(step: int, path: Path) -> str:
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            uri = data_uri(sheet.convert("RGB"), SHEET)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return sentence(f"{path.name} cannot be used: {error}")
    name = "before" if step == 0 else f"after step {step}"
    return f"<details><summary>{name}</summary><img class='sheet' src='{uri}' alt='evaluation {name}'></details>"


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """PNG of what is small, with its own pixels; else a JPEG of at most `side` pixels."""
    file, small = io.BytesIO(), max(image.size) <= SMALL
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((side, side))
        image.save(file, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
