"""GenEval's reward: tiny random models from disk, the library's own post-processing, plain arithmetic on made-up objects."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from omni_rollout import plugins
from omni_rollout.data.prompts import load_prompts
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.rewards import WeightedSum, get_reward
from omni_rollout.rewards.base import sizes
from omni_rollout.rewards.base.geneval_rows import COLORS, MOST, RELATIONS, Asked, Clause, asked_of
from omni_rollout.rewards.base.instances import Detector, Instance
from omni_rollout.rewards.geneval import MODEL, GenEval, met, relations
from tests.unit.test_reward_models import clip

__all__ = ["clip"]  # the fixture

CLASSES = ["dog", "sofa", "mouse"]  # as a detector has them: the last two are other words in GenEval
KNOWN = ["dog", "couch", "computer mouse"]
IMAGES = [
    np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    for seed, size in enumerate([(48, 80, 3), (64, 64, 3), (97, 31, 3), (3, 50, 3)])
]
ROWS = [  # one of each of the benchmark's kinds
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "couch", "count": 1}],
        "prompt": "a photo of a dog and a couch",
    },
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 3}],
        "exclude": [{"class": "dog", "count": 4}],
        "prompt": "a photo of three dogs",
    },
    {"tag": "colors", "include": [{"class": "couch", "count": 1, "color": "red"}], "prompt": "a photo of a red couch"},
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "computer mouse", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a computer mouse left of a dog",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "couch", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red dog and a blue couch",
    },
]


def make_detector(folder: Path, queries: int) -> Path:
    """Random, but surer than random ones of classes and masks: nearly every query an object above 0.3, some above 0.9."""
    backbone = SwinConfig(
        **{"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small: dict[str, Any] = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, num_queries=queries, id2label=dict(enumerate(CLASSES)), **small, **layers)
    )
    with torch.no_grad():
        model.class_predictor.weight *= 30
        for parameter in list(model.model.transformer_module.decoder.mask_predictor.mask_embedder.children())[-1].parameters():
            parameter *= 30_000
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_detector(tmp_path_factory.mktemp("mask2former"), queries=60)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finds as many objects as prompts ask for."""
    return make_detector(tmp_path_factory.mktemp("few"), queries=5)


def reward_of(detector: Path, clip: Path, name: str = "geneval") -> GenEval:
    found = get_reward(name, model=f"{detector}+{clip}")
    assert isinstance(found, GenEval)
    return found


def by_the_library(detector: Path, image: np.ndarray, above: float) -> list[tuple[str, float, torch.Tensor]]:
    """Name, score and mask of the image's size, as the library's own post-processing gives them."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(detector)
    with torch.no_grad():
        out = model(**processor([Image.fromarray(image)], return_tensors="pt"))
    done = processor.post_process_instance_segmentation(
        out, threshold=above, target_sizes=[image.shape[:2]], return_binary_maps=True
    )[0]
    infos, masks = done["segments_info"], done["segmentation"]
    found = [(CLASSES[one["label_id"]], one["score"], mask) for one, mask in zip(infos, masks, strict=False)]
    return sorted(found, key=lambda one: -one[1])


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: "x".join(map(str, image.shape[:2])))
@pytest.mark.parametrize("above", [0.3, 0.9, 1.0])
def test_objects_are_those_of_the_librarys_own_post_processing(detector: Path, image: np.ndarray, above: float) -> None:
    found, expected = Detector("geneval", str(detector))(image, above), by_the_library(detector, image, above)
    assert [(one.name, one.score) for one in found] == [one[:2] for one in expected]
    assert bool(found) == (above < 1)
    for instance, (_, _, mask) in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(instance.mask), mask > 0)
        pixels = [(x, y) for y, row in enumerate(instance.mask) for x, there in enumerate(row) if there]
        xs, ys = zip(*pixels, strict=True)
        assert instance.box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def test_confidence_names_and_the_most_that_count(detector: Path, clip: Path) -> None:
    reward = reward_of(detector, clip)
    for tag, above in (("colors", 0.3), ("counting", 0.9), (None, 0.3)):
        asked = asked_of("a", {"include": [{"class": "dog", "count": 1}]} | ({"tag": tag} if tag else {}), KNOWN)
        found = reward._objects(IMAGES[0], asked)
        expected = [(one[0], one[1]) for one in by_the_library(detector, IMAGES[0], above) if one[1] > above]
        for ours, theirs in zip(KNOWN, CLASSES, strict=True):
            scores = [score for name, score in expected if name == theirs]
            assert [one.score for one in found.get(ours, [])] == scores[:MOST]
    everything = by_the_library(detector, IMAGES[0], 0.3)
    counts = [sum(one[0] == name for one in everything) for name in CLASSES]
    assert max(counts) > MOST and len(by_the_library(detector, IMAGES[0], 0.9)) not in (0, len(everything)), "a test of both"


BOXES = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 40)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(one=BOXES, other=BOXES)
@settings(deadline=None, max_examples=400)
def test_positions_against_exact_arithmetic(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Of fractions: more than half of the whole distance is four times its square."""
    expected, near = set(), False
    distance = [Fraction(one[axis] + one[axis + 2] - other[axis] - other[axis + 2], 2) for axis in (0, 1)]
    whole = distance[0] ** 2 + distance[1] ** 2
    for axis, (less, more) in enumerate((RELATIONS[:2], RELATIONS[2:])):
        sizes = one[axis + 2] - one[axis] + other[axis + 2] - other[axis]
        counted = abs(distance[axis]) - Fraction(sizes, 10)
        near |= abs(4 * counted**2 - whole) < Fraction(1, 10**9)
        if counted > 0 and 4 * counted**2 > whole:
            expected.add(less if distance[axis] < 0 else more)
    assert near or relations(one, other) == expected
    flipped = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(other, one) == {flipped[name] for name in relations(one, other)}


def test_left_is_left() -> None:
    left, right, low = (0, 0, 10, 10), (30, 0, 40, 10), (0, 30, 10, 40)
    assert relations(left, right) == {"left of"} and relations(right, left) == {"right of"}
    assert relations(left, low) == {"above"} and relations(low, left) == {"below"}
    assert relations(right, low) == {"above", "right of"} and relations(left, left) == set()
    assert relations((0, 0, 10, 10), (2, 0, 12, 10)) == set(), "a tenth of both sizes does not count"
    assert relations((0, 0, 10, 10), (5, 0, 15, 10)) == {"left of"}


def rectangle(name: str, score: float, box: tuple[int, ...], side: int = 80) -> Instance:
    mask = np.zeros((side, side), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Instance(name=name, score=score, mask=mask)


NAMES = ("dog", "couch")
FOUND = st.lists(st.tuples(st.sampled_from(NAMES), BOXES, st.sampled_from(COLORS[:2])), max_size=6)


@st.composite
def rows(draw: st.DrawFn) -> Asked:
    include: list[Clause] = []
    for place in range(draw(st.integers(0, 3))):
        color = draw(st.none() | st.sampled_from(COLORS[:2]))
        relation = draw(st.none() | st.sampled_from(RELATIONS)) if place else None
        position = None if relation is None else (relation, draw(st.integers(0, place - 1)))
        name, count = draw(st.sampled_from(NAMES)), draw(st.integers(1, 3))
        include.append(Clause(name=name, count=count, color=color, position=position))
    exclude = draw(st.lists(st.builds(Clause, name=st.sampled_from(NAMES), count=st.integers(1, 4)), max_size=2))
    return Asked(include=tuple(include), exclude=tuple(exclude), confidence=0.3)


class ByHand:
    """The same conditions, asked one by one and from the last clause backwards."""

    def __init__(self, asked: Asked, found: Sequence[tuple[str, tuple[int, ...], str]], exact: bool) -> None:
        self.asked, self.found, self.exact = asked, found, exact

    def all_of(self, name: str) -> list[tuple[str, tuple[int, ...], str]]:
        return [one for one in self.found if one[0] == name]

    def number(self, clause: Clause) -> Fraction:
        there = len(self.all_of(clause.name))
        if there > clause.count:
            excess = there - clause.count
            return max(Fraction(0), Fraction(clause.count - excess, clause.count)) if self.exact else Fraction(1)
        return Fraction(there, clause.count)

    def color(self, clause: Clause) -> Fraction:
        if self.number(clause) < 1:
            return Fraction(0)
        return Fraction(sum(one[2] == clause.color for one in self.all_of(clause.name)[: clause.count]), clause.count)

    def holds(self, clause: Clause) -> bool:
        return (
            self.number(clause) == 1
            and (clause.color is None or self.color(clause) == 1)
            and (clause.position is None or self.placed(clause))
        )

    def placed(self, clause: Clause) -> bool:
        assert clause.position is not None
        target = self.asked.include[clause.position[1]]
        if not self.holds(replace(clause, position=None)) or not self.holds(target):
            return False
        ours, theirs = (self.all_of(one.name)[: one.count] for one in (clause, target))
        return not [1 for one in ours for other in theirs if clause.position[0] not in relations(one[1], other[1])]

    def shares(self) -> list[Fraction]:
        shares = []
        for clause in self.asked.include:
            shares.append(self.number(clause))
            if clause.color is not None:
                shares.append(self.color(clause))
            if clause.position is not None:
                shares.append(Fraction(self.placed(clause)))
        return [*shares, *(Fraction(clause.count > len(self.all_of(clause.name))) for clause in self.asked.exclude)]


@given(asked=rows(), found=FOUND, exact=st.booleans())
@settings(deadline=None, max_examples=500)
def test_conditions_against_arithmetic_by_hand(asked: Asked, found: Any, exact: bool) -> None:
    objects: dict[str, list[Instance]] = {}
    colors: dict[int, str] = {}
    for place, (name, box, color) in enumerate(found):
        instance = rectangle(name, 1 - place / 10, box)
        objects.setdefault(name, []).append(instance)
        colors[id(instance)] = color

    def seen(own: Sequence[Instance], name: str) -> list[str]:
        assert all(one.name == name for one in own)
        return [colors[id(one)] for one in own]

    shares = met(asked, objects, seen, exact=exact)
    assert shares == pytest.approx([float(share) for share in ByHand(asked, found, exact).shares()])
    conditions = sum(1 + (one.color is not None) + (one.position is not None) for one in asked.include) + len(asked.exclude)
    assert len(shares) == conditions, "however the image is: so that images of one prompt are compared by the same mean"


@pytest.mark.parametrize(
    ("there", "mean", "strict"),
    [
        # three are asked for and four excluded: the number, and that
        (0, (0 + 1) / 2, 0.0),
        (2, (2 / 3 + 1) / 2, 0.0),
        (3, 1.0, 1.0),
        (4, (2 / 3 + 0) / 2, 0.0),
        (9, 0.0, 0.0),
    ],
)
def test_counting(detector: Path, clip: Path, there: int, mean: float, strict: float) -> None:
    reward = reward_of(detector, clip)
    objects = {"dog": [rectangle("dog", 0.95, (0, 0, 5, 5))] * there}
    asked = asked_of("three dogs", ROWS[2], KNOWN)
    assert reward._score(IMAGES[0], asked, objects, strict=False) == pytest.approx(mean)
    assert reward._score(IMAGES[0], asked, objects, strict=True) == strict


def test_more_than_was_asked_for_is_right_to_geneval_and_less_so_to_learn_from(detector: Path, clip: Path) -> None:
    reward = reward_of(detector, clip)
    asked, objects = asked_of("a dog", ROWS[0], KNOWN), {"dog": [rectangle("dog", 0.95, (0, 0, 5, 5))] * 2}
    assert reward._score(IMAGES[0], asked, objects, strict=True) == 1.0
    assert reward._score(IMAGES[0], asked, objects, strict=False) == 0.0


def test_a_colour_is_clips_of_the_object_on_grey(clip: Path, detector: Path) -> None:
    """By the model's own forward pass of a picture that PIL composes, one object and one colour at a time."""
    reward = reward_of(detector, clip)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    picture = np.kron(np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
    boxes = [(0, 0, 80, 80), (0, 0, 9, 30), (33, 41, 36, 80), (70, 2, 71, 9), (50, 50, 79, 53), (20, 5, 60, 25)]
    shaped = [rectangle("dog", 0.9, box) for box in boxes]
    for instance in shaped[:2]:
        instance.mask[::3, ::2] = False
    expected, all_cosines = [], []
    for name in ("dog", "couch"):
        for instance in shaped:
            grey = Image.new("RGB", (80, 80), "#999")
            whole = Image.composite(Image.fromarray(picture), grey, Image.fromarray(instance.mask))
            pixels = processor([whole.crop(instance.box)], return_tensors="pt")["pixel_values"]
            cosines = []
            for color in COLORS:
                texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
                with torch.no_grad():
                    out = [model(**tokenizer([text], return_tensors="pt"), pixel_values=pixels) for text in texts]
                text = torch.stack([one.text_embeds[0] for one in out]).mean(dim=0)
                cosines.append((out[0].image_embeds[0] @ text / text.norm()).item())
            expected.append(COLORS[int(np.argmax(cosines))])
            all_cosines.append(cosines)
    assert [*reward._colors(picture, shaped, "dog"), *reward._colors(picture, shaped, "couch")] == expected
    assert len(set(expected)) > 1, "the objects are told apart"
    assert min(np.diff(sorted(cosines)[-2:])[0] for cosines in all_cosines) > 1e-5, "no colour is a matter of rounding"


def met_by(reward: GenEval, image: np.ndarray, row: dict[str, Any], *, exact: bool) -> list[float]:
    asked = asked_of("a", row, KNOWN)
    return met(asked, reward._objects(image, asked), lambda own, name: reward._colors(image, own, name), exact=exact)


def test_geneval_s_own_file_is_taken_as_it_is(tmp_path: Path, few: Path, clip: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompts = load_prompts(file)
    assert [{"prompt": one.text, **one.metadata} for one in prompts] == ROWS
    model = {"geneval": f"{few}+{clip}", "geneval_strict": f"{few}+{clip}"}
    settings = compose(["experiment=nano_ocr", "reward=geneval"]).reward
    assert settings.weights == {"geneval": 1.0}
    settings.model = model
    rewards = WeightedSum({"geneval": 1.0, "geneval_strict": 0.5}, settings=settings)
    rewards.check(prompts, "image")
    with pytest.raises(UserError, match="reward geneval scores image, this model makes video"):
        rewards.check(prompts, "video")
    images = [IMAGES[place % 3] for place in range(len(ROWS))]
    batch = rewards(images, prompts)
    assert not batch.failures
    for name, exact in (("geneval", True), ("geneval_strict", False)):
        for image, row, score in zip(images, ROWS, batch.breakdown[name], strict=True):
            shares = met_by(reward_of(few, clip), image, row, exact=exact)
            assert score == (fmean(shares) if exact else float(min(shares) == 1))
    means = {name: fmean(value or 0.0 for value in values) for name, values in batch.breakdown.items()}
    assert len(set(batch.breakdown["geneval"])) > 2 and 0 < means["geneval_strict"] < 1
    found, failures = rewards.evaluate(images, prompts, batch)
    assert found == pytest.approx(means) and not failures


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"asks for no object; expected metadata `include`"),
        ({"include": []}, r"asks for no object"),
        ({"include": DOG}, r"`include` is \{.*; expected a list of objects with class and count"),
        ({"include": ["dog"]}, r"`include`\[0\]: is 'dog'; expected an object with class, count"),
        ({"include": [DOG, {"class": "dog"}]}, r"`include`\[1\]: is \{'class': 'dog'\}; expected an object with class, count"),
        ({"include": [{**DOG, "colour": "red"}]}, r"and of class, count, color, position no other"),
        ({"include": [{**DOG, "class": "unicorn"}]}, r"knows no 'unicorn'; did you mean .*\? It knows dog, couch, computer m"),
        ({"include": [{**DOG, "class": ["dog"]}]}, r"the detector knows no \['dog'\]"),
        *(
            ({"include": [{**DOG, "count": count}]}, f"count is {count!r}; expected 1 to 16")
            for count in (0, -1, 17, "1", True, 1.0)
        ),
        ({"include": [{**DOG, "color": "mauve"}]}, r"color is 'mauve'; expected one of red, orange"),
        (
            {"include": [{**DOG, "position": ["left of", 0]}]},
            r"position is \['left of', 0\]; expected a list of one of left of",
        ),
        ({"include": [DOG, {**DOG, "position": ["near", 0]}]}, r"`include`\[1\]: position is \['near', 0\]"),
        ({"include": [DOG, {**DOG, "position": ["left of", -1]}]}, r"position is \['left of', -1\]"),
        ({"include": [DOG, {**DOG, "position": "left of"}]}, r"position is 'left of'"),
        ({"include": [DOG], "exclude": [{**DOG, "color": "red"}]}, r"`exclude`\[0\]: .* no other"),
        ({"include": [DOG], "tag": 7}, r"`tag` is 7; expected a word"),
    ],
)
def test_rows_that_are_not_geneval_s_are_refused_before_any_image(
    columns: dict[str, Any], message: str, detector: Path, clip: Path
) -> None:
    reward = reward_of(detector, clip)
    with pytest.raises(UserError, match=rf"geneval: prompt 'three dogs': .*{message}"):
        reward.check(["a dog", "three dogs"], [{"include": [DOG]}, columns])


def test_what_is_left_out_and_other_words_for_a_class() -> None:
    asked = asked_of("a", {"include": [{"class": "sofa", "count": 2, "color": None, "position": None}], "exclude": None}, KNOWN)
    assert asked.include == (Clause(name="couch", count=2),) and asked.exclude == ()
    assert asked_of("a", {"exclude": [{"class": "mouse", "count": 1}]}, KNOWN).exclude[0].name == "computer mouse"


def test_another_models_folder_is_refused_and_not_filled_with_random_numbers(
    detector: Path, clip: Path, tmp_path: Path
) -> None:
    for model in (f"{clip}+{detector}", f"{tmp_path}+{clip}", str(clip)):
        with pytest.raises(UserError, match=r"reward geneval: no Mask2Former in .*; give reward\.model\.geneval=FOLDER"):
            get_reward("geneval", model=model)
    for model in (f"{detector}+{detector}", f"{detector}+{tmp_path}"):
        with pytest.raises(UserError, match=r"reward geneval: no CLIP model in .*; give reward\.model\.geneval=FOLDER"):
            get_reward("geneval", model=model)
    with pytest.raises(UserError, match=r"reward pickscore: no CLIP model in .* \(it lacks \d+ of the weights of a CLIPModel"):
        get_reward("pickscore", model=str(detector))


def test_the_page_has_a_row_for_every_reward() -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(plugins.registered("rewards"))
    (line,) = re.findall(r"^```json\n(.*)\n```", page, re.MULTILINE)
    assert asked_of("a", json.loads(line), ["dog", "tv"]).include[1].position == ("left of", 0)


def test_plan_counts_both_models(detector: Path, clip: Path) -> None:
    def planned(*words: str) -> dict[str, int | None]:
        return sizes.model_bytes(compose(["experiment=nano_ocr", "reward=geneval", *words]))

    def stored(module: torch.nn.Module) -> int:
        return sum(one.numel() * one.element_size() for one in module.state_dict().values())

    own = stored(Mask2FormerForUniversalSegmentation.from_pretrained(detector))
    beside = sum(one.numel() for one in CLIPModel.from_pretrained(clip).parameters()) * 4
    assert planned(f"reward.model.geneval={detector}+{clip}") == {"geneval": own + beside}
    both = planned(
        f"reward.model.geneval={detector}+{clip}", "+reward.weights.clip_score=1", f"+reward.model.clip_score={clip}"
    )
    assert both == {"clip_score": beside, "geneval": own}, "one CLIP for both"
    assert planned("reward.model.geneval=some/other") == {"geneval": None}
    with torch.device("meta"):
        swin = SwinConfig(
            **{"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        published = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
    parameters = sum(one.numel() for one in published.parameters())
    assert planned() == {"geneval": 4 * (parameters + sizes.clip_parameters(sizes.PUBLISHED[MODEL.partition("+")[2]]))}
