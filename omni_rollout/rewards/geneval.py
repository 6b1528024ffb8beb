"""How much of what a prompt asks for an image shows: objects, how many, of which colour and where (GenEval, arXiv 2310.11513).

A prompt's columns are those of GenEval's own file: `include`, a list of objects `{class, count, color, position}`, of which the
last two may be left out (position: a relation and the place in the list of what it is to); `exclude`, a list of
`{class, count}`, so many there must not be; and `tag`.

Objects are found by Mask2Former and a colour is the one of ten to which CLIP finds the object most similar, cut out on grey, by
the mean of three sentences. Confidence is above 0.3, where `tag` is `counting` above 0.9; at most 16 of a class count.

The reward is the mean of how far each condition is met: of every object its number, its colour and its position, and that what
is excluded is not there. It is Flow-GRPO's (arXiv 2505.05470) in that a number must be exact and counts by
1 - |found - asked| / asked, and colour and position count where the number is right. `geneval_strict` is GenEval's own 0 or 1,
which asks for so many at least and looks at the surest of them. The mean is the better one to learn from: with 0 or 1 a group
whose images all fail, as those of hard prompts do at first, teaches nothing.

What differs from GenEval: the same architecture and data, but transformers' weights of it (Mask2Former's authors', where
GenEval has MMDetection's), whose masks are of 384 x 384 pixels before they are scaled to the image; `transformers`' CLIP-L,
with OpenAI's weights as there. From Flow-GRPO: no number counts below 0; `exclude` is a condition too; a position that is wrong
counts as 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from omni_rollout.rewards.base.contract import Columns, score_each
from omni_rollout.rewards.base.geneval_rows import COLORS, MOST, NAMES, RELATIONS, Asked, asked_of
from omni_rollout.types import Kind

if TYPE_CHECKING:  # planning reads MODEL, and must not pay for torch
    import torch

    from omni_rollout.rewards.base.instances import Instance

CLIP = "openai/clip-vit-large-patch14"
MODEL = f"facebook/mask2former-swin-small-coco-instance+{CLIP}"

SHARE = 0.1  # of the sum of two objects' sizes: the part of their distance that does not count
SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99


class GenEval:
    """0 to 1.

    Args:
        model: DETECTOR+CLIP, folders or hub ids; without the second CLIP-L.
        strict: 1 where all conditions are met as GenEval has them, else 0.
    """

    kinds: frozenset[Kind] = frozenset({"image"})

    def __init__(self, name: str, model: str, *, strict: bool) -> None:
        from omni_rollout.rewards.base.clip import Clip
        from omni_rollout.rewards.base.instances import Detector

        detector, _, clip = model.partition("+")
        self.name, self.strict = name, strict
        self._detector = Detector(name, detector)
        self._clip = Clip(name, clip or CLIP)
        self._names = {known: NAMES.get(known, known) for known in self._detector.classes}
        self._texts: dict[str, torch.Tensor] = {}  # class -> embeddings of its colours [10, D]

    def check(self, prompts: Sequence[str], metadata: Sequence[Columns]) -> None:
        for prompt, columns in zip(prompts, metadata, strict=True):
            self._asked(prompt, columns)

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> list[float]:
        def score(image: np.ndarray, prompt: str, columns: Columns) -> float:
            asked = self._asked(prompt, columns)
            return self._score(image, asked, self._objects(image, asked), strict=self.strict)

        return score_each(self.name, images, prompts, metadata, score)

    def evaluate(self, images: Sequence[np.ndarray], prompts: Sequence[str], metadata: Sequence[Columns]) -> dict[str, float]:
        """The means of both forms."""
        forms: dict[str, list[float]] = {"geneval": [], "geneval_strict": []}

        def score(image: np.ndarray, prompt: str, columns: Columns) -> float:
            asked = self._asked(prompt, columns)
            objects = self._objects(image, asked)
            for form, scores in forms.items():
                scores.append(self._score(image, asked, objects, strict=form == "geneval_strict"))
            return forms[self.name][-1]

        score_each(self.name, images, prompts, metadata, score)
        return {form: fmean(scores) for form, scores in forms.items()}

    def _asked(self, prompt: str, columns: Columns) -> Asked:
        return asked_of(prompt, columns, self._names.values())

    def _objects(self, image: np.ndarray, asked: Asked) -> dict[str, list[Instance]]:
        """GenEval's name of a class -> its objects, the surest first."""
        objects: dict[str, list[Instance]] = {}
        for instance in self._detector(image, asked.confidence):
            objects.setdefault(self._names[instance.name], []).append(instance)
        return {name: own[:MOST] for name, own in objects.items()}

    def _score(self, image: np.ndarray, asked: Asked, objects: Mapping[str, Sequence[Instance]], *, strict: bool) -> float:
        shares = met(asked, objects, lambda own, name: self._colors(image, own, name), exact=not strict)
        return float(all(share == 1 for share in shares)) if strict else fmean(shares)

    def _colors(self, image: np.ndarray, objects: Sequence[Instance], name: str) -> list[str]:
        if name not in self._texts:
            sentences = [form.format(color=color, name=name) for color in COLORS for form in SENTENCES]
            self._texts[name] = self._clip.texts(sentences).unflatten(0, (len(COLORS), len(SENTENCES))).mean(dim=1)
            self._texts[name] /= self._texts[name].norm(dim=-1, keepdim=True)
        cosines = self._clip.images([cut_out(image, instance) for instance in objects]) @ self._texts[name].T
        return [COLORS[index] for index in cosines.argmax(dim=-1).tolist()]


def make(threads: int, model: str = MODEL) -> GenEval:
    return GenEval("geneval", model, strict=False)


def met(
    asked: Asked,
    objects: Mapping[str, Sequence[Instance]],
    colors: Callable[[Sequence[Instance], str], Sequence[str]],
    *,
    exact: bool,
) -> list[float]:
    """How far each condition is met, 0 to 1.

    Args:
        objects: of each class, the surest first.
        colors: of objects of a class, one each.
        exact: more objects than asked for are wrong; else the surest are looked at, as many as asked for.
    """
    shares: list[float] = []
    groups: list[Sequence[Instance]] = []  # of each clause; empty where it is not met
    for clause in asked.include:
        found = objects.get(clause.name, ())
        found = found if exact else found[: clause.count]
        own = [max(0.0, 1 - abs(len(found) - clause.count) / clause.count)]
        right = own[0] == 1
        if clause.color is not None:
            own.append(list(colors(found, clause.name)).count(clause.color) / clause.count if right else 0.0)
        if clause.position is not None:
            relation, place = clause.position
            targets = groups[place] if all(share == 1 for share in own) else ()
            pairs = [relation in relations(one.box, target.box) for one in found for target in targets]
            own.append(float(bool(pairs) and all(pairs)))
        groups.append(found if all(share == 1 for share in own) else ())
        shares += own
    return shares + [float(len(objects.get(clause.name, ())) < clause.count) for clause in asked.exclude]


def relations(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where one box is to another, each left, top, right, bottom: of `RELATIONS` none, one, or two.

    An axis counts by the distance of the centres less 0.1 times both sizes, and is a relation where that is more than half of
    the whole distance.
    """
    boxes = np.array([one, other], float).reshape(2, 2, 2)  # box, corner, axis
    distance = np.subtract(*boxes.mean(axis=1))
    counted = np.maximum(np.abs(distance) - SHARE * (boxes[:, 1] - boxes[:, 0]).sum(axis=0), 0)
    if (counted < 1e-3).all():  # of a pixel
        return set()
    x, y = np.sign(distance) * counted / np.linalg.norm(distance)
    return {name for name, share in zip(RELATIONS, (-x, x, -y, y), strict=True) if share > 0.5}


def cut_out(image: np.ndarray, instance: Instance) -> np.ndarray:
    """uint8 [h, w, 3], the object's box of the image [H, W, 3], grey where the object is not."""
    left, top, right, bottom = instance.box
    return np.where(instance.mask[..., None], image, np.uint8(GREY))[top:bottom, left:right]
