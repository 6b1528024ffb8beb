"""Guards against reward hacking: what pictures lose while the reward they are trained for rises. numpy alone, no model.

An OCR reward that rose while dark pixels doubled and colours went was first missed, for the text's score alone was watched.
What is measured here costs nothing and fell at every evaluation. Compared with the starting policy's images of the same prompts
and seeds, which are kept in the run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from omni_rollout.run.folder import EVALUATIONS, START_IMAGES
from omni_rollout.trajectories.sheet import flat

SIGMAS = 3.0
MATERIAL = 0.2  # of the start's mean: a loss that is smaller may be certain, and is no loss to speak of
SIDE = 256  # pixels of the longer side, to which pictures are reduced before they are compared or kept
DARK = 64  # of 255
LEAST_CHROMA = 40  # of 255, the largest minus the smallest of red, green and blue: below, a pixel is black, grey or white
HUES = 12  # classes of colour, 30 degrees each, beside black, grey and white
BAD = {"sharpness": -1, "contrast": -1, "colour_entropy": -1, "dark_share": 1, "diversity": -1}  # which way is a loss
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def of_image(image: np.ndarray) -> dict[str, float]:
    """uint8 [H, W, 3] -> `sharpness`: mean absolute Laplacian of the brightness; `contrast`: its standard deviation;
    `dark_share`: share of pixels below 64 of 255; `colour_entropy`: bits of the histogram of `colour_classes`."""
    luma = image @ LUMA
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    shares = colour_shares(image)
    used = shares[shares > 0]
    return {
        "sharpness": float(np.abs(laplacian).mean()) if laplacian.size else 0.0,
        "contrast": float(luma.std()),
        "colour_entropy": float(-(used * np.log2(used)).sum()),
        "dark_share": float((luma < DARK).mean()),
    }


def colour_classes(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> int [H, W]: 0 to 11, the hue in steps of 30 degrees, red around 0; 12 black, 13 grey, 14 white."""
    rgb = image.astype(np.float64)
    chroma = rgb.max(axis=-1) - rgb.min(axis=-1)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    # The angle of the three axes' projection on the plane of equal brightness.
    angle = np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    hue = np.round(angle * HUES / 360).astype(int) % HUES
    grey = HUES + np.minimum((image @ LUMA) * 3 // 256, 2).astype(int)
    return np.where(chroma < LEAST_CHROMA, grey, hue)


def colour_shares(image: np.ndarray) -> np.ndarray:
    """[15], the share of each class; sums to 1."""
    return np.bincount(colour_classes(image).ravel(), minlength=HUES + 3) / (image.shape[0] * image.shape[1])


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square of the pixels' differences, as a share of full scale."""
    return float(np.sqrt(((first.astype(np.float64) - second) ** 2).mean())) / 255


def colour_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Hellinger distance of the shares of colours, 0 to 1, wherever in the picture they are. A colour of few pixels that
    becomes another counts for much, the same colours in other shares for little."""
    overlap = np.sqrt(colour_shares(first) * colour_shares(second)).sum()
    return math.sqrt(max(0.0, 1 - float(overlap)))


class Guards:
    """Looks at the images of every evaluation; the first it sees in a run folder are the start.

    Keeps what it finds of each: `evaluation.jsonl`, lines of `step`, `index`, `prompt`, `reward` (null: not scored), `guards`.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._path, self._per_image = Path(run_dir) / START_IMAGES, Path(run_dir) / EVALUATIONS

    def __call__(
        self, step: int, media: Sequence[np.ndarray], prompts: Sequence[str], rewards: Sequence[float | None]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """The metrics `guard/*`, and the note `guard/lost` where the reward rose and a guard lost more than its noise.

        Lost is a mean over images (or prompts) that is 3 standard errors of the paired differences, and a fifth of the start's
        mean, to the worse; or images further from the start's of the same seed, in pixels or in colours, than the start's
        own images of the same prompt are from each other, by 3 standard errors.

        Args:
            media: see `Trajectory.media`.
            rewards: the trained reward of each; None could not be scored.
        """
        reward = fmean(scored) if (scored := [one for one in rewards if one is not None]) else math.nan
        pictures = [flat(prompt, one) for prompt, one in zip(prompts, media, strict=True)]
        own = [of_image(picture) for picture in pictures]
        self._keep(step, prompts, rewards, own)
        small = [_reduced(picture) for picture in pictures]
        per_image = {name: np.array([one[name] for one in own]) for name in own[0]}
        pairs = list(_pairs(prompts, small))
        if pairs:
            per_image["diversity"] = np.array([distance(small[one], small[other]) for one, other in pairs])
        metrics = {f"guard/{name}": float(values.mean()) for name, values in per_image.items()}
        start = self._start(step, small, per_image, reward)
        if start is None:
            return metrics, {}
        before = [start[f"image_{index}"] for index in range(len(small))]
        lost = [
            f"{name} {values.mean():.3g}, was {start[name].mean():.3g}"
            for name, values in per_image.items()
            if _worse(BAD[name] * (values - start[name]), MATERIAL * abs(start[name].mean()))
        ]
        for name, measure in (("start_distance", distance), ("start_colour_distance", colour_distance)):
            gone = np.array([measure(*both) for both in zip(small, before, strict=True)])
            metrics[f"guard/{name}"] = float(gone.mean())
            noise = np.array([measure(before[one], before[other]) for one, other in pairs])
            if len(noise) and _further(gone, noise):
                lost.append(f"{name} {gone.mean():.3g}, where other seeds of the same prompt differ by {noise.mean():.3g}")
        rose = reward > float(start["reward"])
        return metrics, {"guard/lost": "; ".join(lost)} if rose and lost else {}

    def _keep(
        self, step: int, prompts: Sequence[str], rewards: Sequence[float | None], own: Sequence[Mapping[str, float]]
    ) -> None:
        with self._per_image.open("a", encoding="utf-8") as file:
            for index, (prompt, reward, guards) in enumerate(zip(prompts, rewards, own, strict=True)):
                line = {"step": step, "index": index, "prompt": prompt, "reward": reward, "guards": guards}
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def _start(
        self, step: int, small: Sequence[np.ndarray], per_image: dict[str, np.ndarray], reward: float
    ) -> dict[str, np.ndarray] | None:
        """What the starting policy's images were; None where this is the start, or the start is not known."""
        if step == 0:
            images = {f"image_{index}": picture for index, picture in enumerate(small)}
            np.savez_compressed(self._path, allow_pickle=False, reward=reward, **images, **per_image)
        if step == 0 or not self._path.is_file():
            return None
        with np.load(self._path, allow_pickle=False) as kept:
            start = dict(kept)
        same = all(f"image_{i}" in start and start[f"image_{i}"].shape == one.shape for i, one in enumerate(small))
        same = same and all(start[name].shape == values.shape for name, values in per_image.items() if name in start)
        return start if same else None  # of other settings: nothing can be compared


def _reduced(picture: np.ndarray) -> np.ndarray:
    scale = SIDE / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def _pairs(prompts: Sequence[str], small: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Places of two images of one prompt and size, every two of them."""
    places: dict[object, list[int]] = {}
    for place, (prompt, picture) in enumerate(zip(prompts, small, strict=True)):
        places.setdefault((prompt, picture.shape), []).append(place)
    for own in places.values():
        yield from combinations(own, 2)


def _worse(change: np.ndarray, material: float) -> bool:
    """Whether a mean above 0 is no chance, and large enough to matter."""
    return bool(change.mean() > max(SIGMAS * _error(change), material, 1e-9))


def _further(gone: np.ndarray, noise: np.ndarray) -> bool:
    return bool(gone.mean() - noise.mean() > SIGMAS * math.hypot(_error(gone), _error(noise)))


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
