"""Prompts -> requests: what is decided before dispatch, and what is refused before the engine sees it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.config import CollateConfig, EvaluationConfig, SamplingConfig, SDETypeName, Width
from omni_rollout.data.collate import Collator, derive_seed
from omni_rollout.data.seeds import SeedLedger
from omni_rollout.models.base.velocity import pad_to_width
from omni_rollout.models.qwen_image.spec import DEFAULTS, resolve, text_tokens
from omni_rollout.nano.tokenizer import make_tokenizer
from omni_rollout.types import Prompt, RequestError, SamplingSpec


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def collator(tokenizer, width: int = 24, **sampling) -> Collator:
    values = {"height": 64, "width": 64, "num_inference_steps": 10, "true_cfg_scale": 1.0, **sampling}
    return Collator("qwen_image", tokenizer, SamplingConfig(**values), CollateConfig(prompt_width=width))


def test_members_of_a_group_share_prompt_and_window_but_not_the_seed(tokenizer):
    requests = collator(tokenizer, sde_window_size=2).groups([Prompt(text="a red cat"), Prompt(text="a dog")], 3, 4)
    assert len(requests) == 8 and len({r.seed for r in requests}) == 8 and len({r.request_id for r in requests}) == 8
    for group in {r.group_id for r in requests}:
        members = [r for r in requests if r.group_id == group]
        assert [r.member for r in members] == [0, 1, 2, 3]
        assert len({r.prompt.text for r in members}) == len({r.spec.step_indices for r in members}) == 1


def test_windows_differ_between_groups_and_repeat_between_runs(tokenizer):
    def windows() -> list[tuple[int, ...]]:
        made = collator(tokenizer, sde_window_size=2, sde_window_range=[0, 6])
        return [made.groups([Prompt(text="a cat")], step, 1)[0].spec.step_indices for step in range(30)]

    assert windows() == windows()
    assert {window[0] for window in windows()} == {0, 1, 2, 3, 4}
    assert all(window == (window[0], window[0] + 1) for window in windows())


def test_every_evaluation_is_deterministic_and_of_the_same_seeds(tokenizer):
    prompts, settings = [Prompt(text="a red cat"), Prompt(text="a dog")], EvaluationConfig(images=3, seed=5)
    before, after = (collator(tokenizer).evaluation(prompts, settings, name) for name in ("before", "step_00080"))
    assert [r.request_id for r in before] == [f"evaluation-before-{index:05d}-00" for index in range(3)]
    assert [r.prompt.text for r in before] == ["a red cat", "a dog", "a red cat"]
    assert [r.seed for r in before] == [r.seed for r in after] == [derive_seed(5, index) for index in range(3)]
    assert {r.spec.sde_type for r in before} == {"ode"}


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"sde_window_range": [0, 10]}, "the last step is deterministic"),
        ({"sde_window_range": [5, 5]}, "expected 0 <= first < end"),
        ({"sde_window_size": 0}, "expected 1 to 9"),
        ({"sde_window_size": 4, "sde_window_range": [2, 5]}, "expected 1 to 3"),
    ],
)
def test_impossible_windows_are_refused(tokenizer, sampling, message):
    with pytest.raises(RequestError, match=message):
        collator(tokenizer, **sampling).groups([Prompt(text="a cat")], 0, 1)


def test_a_text_past_the_width_is_refused_naming_the_width_it_needs(tokenizer):
    made = collator(tokenizer, width=10)
    with pytest.raises(RequestError, match=r"has (\d+) text tokens, the fixed width is 10.*collate.prompt_width=\d+"):
        made.groups([Prompt(text="a red cat " * 10)], 0, 1)
    with pytest.raises(RequestError, match="negative prompt"):
        collator(tokenizer, width=10, true_cfg_scale=2.0, negative_prompt="a red cat " * 10)


def test_zero_is_zero_and_none_is_the_familys_default():
    base = {"prompt_width": 8}
    assert resolve(base).num_inference_steps == DEFAULTS["num_inference_steps"]
    assert resolve(base).true_cfg_scale == DEFAULTS["true_cfg_scale"] and resolve(base).negative_prompt == " "
    off = resolve({**base, "true_cfg_scale": 0.0, "negative_prompt": "ugly"})
    assert off.true_cfg_scale == 0.0 and off.negative_prompt is None and not off.guided
    assert resolve({**base, "cfg_scale": 2.0}).true_cfg_scale == 2.0
    assert resolve({**base, "negative_prompt": ""}).negative_prompt == ""
    silent = resolve({**base, "noise_level": 0.0})
    assert silent.sde_type == "ode" and silent.step_indices == ()


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 72}, "height=72: expected a multiple of 16 pixels; the nearest is"),
        ({"width": 0}, "width=0"),
        ({"noise_level": -0.1}, "noise_level=-0.1"),
        ({"sde_type": "cps", "noise_level": 1.5}, "cps expects 0 to 1"),
        ({"true_cfg_scal": 2.0}, "did you mean true_cfg_scale"),
        ({"prompt_width": 0}, "prompt_width=0"),
        ({"step_indices": (3, 1)}, "neighbouring indices"),
        ({"step_indices": (49,)}, "neighbouring indices"),
        ({"step_indices": ()}, "neighbouring indices"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(parameters, message):
    with pytest.raises(RequestError, match=message):
        resolve({"prompt_width": 8, **parameters})


def test_a_spec_survives_json():
    spec = resolve({"prompt_width": 8, "step_indices": (1, 2)})
    assert SamplingSpec.from_json(spec.to_json()) == spec


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_padding_keeps_the_valid_rows_and_refuses_other_masks(valid, width, seed):
    import torch

    embeds = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(12) < valid
    if valid > width:
        with pytest.raises(RequestError, match="fixed width"):
            pad_to_width(embeds, mask, width, "prompt")
        return
    padded, padded_mask = pad_to_width(embeds, mask, width, "prompt")
    assert torch.equal(padded[:valid], embeds[:valid]) and not padded[valid:].any()
    assert padded_mask.tolist() == [True] * valid + [False] * (width - valid)
    if valid < 12:
        with pytest.raises(RequestError, match="right padded"):
            pad_to_width(embeds, mask.flip(0), width, "prompt")


def test_seeds_are_the_same_everywhere_and_reuse_is_noticed(tokenizer):
    assert derive_seed(0, "a", 1) == 3805457466603685491
    made = collator(tokenizer)
    requests = made.groups([Prompt(text="a cat")], 0, 4)
    ledger = SeedLedger()
    assert ledger.record(requests) == [] and ledger.collisions == 0
    again = made.request(Prompt(text="a cat"), made.spec(), "other", 0, seed=requests[2].seed)
    assert requests[2].request_id in ledger.record([again])[0] and ledger.collisions == 1


def test_the_ledger_is_kept_and_notices_one_noise_under_two_seeds(tokenizer, tmp_path):
    made = collator(tokenizer)
    requests = made.groups([Prompt(text="a cat")], 0, 3)
    ledger = SeedLedger(tmp_path / "seeds.jsonl")
    ledger.record(requests)
    sampled = [
        SimpleNamespace(request_id=r.request_id, fingerprint={"initial_noise": n}) for r, n in zip(requests, "aba", strict=True)
    ]
    assert ledger.record_noise(sampled) == [f"initial_noise a of {requests[2].request_id} was used by {requests[0].request_id}"]
    lines = [json.loads(line) for line in (tmp_path / "seeds.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines[:3]] == [r.seed for r in requests] and [
        line["initial_noise"] for line in lines[3:]
    ] == list("aba")


def test_ode_asks_for_no_stochastic_step(tokenizer):
    requests = collator(tokenizer, sde_type=SDETypeName.ode).groups([Prompt(text="a cat")], 0, 1)
    assert requests[0].spec.step_indices == ()


def test_prompts_of_the_recipe_fit_its_width(tokenizer):
    folder = Path(__file__).parents[2] / "recipes" / "nano" / "data"
    from omni_rollout.data.prompts import load_prompts

    made = collator(tokenizer, width=16)
    for name in ("train.jsonl", "heldout.jsonl"):
        for prompt in load_prompts(folder / name):
            made.check(made.spec(), prompt)


WORDS = st.lists(st.sampled_from(["a", "red", "sign", "42", "cat"]), min_size=1, max_size=20).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(text=WORDS, scale=st.sampled_from([1.0, 4.0]), own=st.sampled_from([None, 32]), kind=st.sampled_from(Width))
def test_a_text_is_as_wide_as_it_is_asked_to_be(tokenizer, text, scale, own, kind):
    given = CollateConfig(prompt_width=48, negative_prompt_width=own, width=kind)
    made = Collator("qwen_image", tokenizer, SamplingConfig(height=64, width=64, true_cfg_scale=scale), given)
    prompt = Prompt(text=text)
    (request,), (evaluated,) = made.groups([prompt], 1, 1), made.evaluation([prompt], EvaluationConfig(images=1), "x")
    spec = request.spec
    tokens = text_tokens(tokenizer, text, spec), text_tokens(tokenizer, spec.negative_prompt or "", spec)
    widths = spec.prompt_width, spec.negative_prompt_width
    assert (evaluated.spec.prompt_width, evaluated.spec.negative_prompt_width) == widths == _widths(made.asked(prompt).spec)
    assert tokens[0] <= widths[0] <= 48 and (scale == 1.0 or tokens[1] <= widths[1])
    if kind is Width.natural:
        assert widths == (tokens[0], tokens[1] if scale > 1 else tokens[0])
        assert made.padding([request]) == 0.0
    elif kind is Width.bucketed:
        assert widths[0] % 16 == widths[1] % 16 == 0
        wider = max(tokens) if scale > 1 and own is None else tokens[0]
        assert wider <= widths[0] < wider + 16
        assert scale == 1.0 or (widths[1] < tokens[1] + 16 if own else widths[0] == widths[1])
    else:
        assert widths == (48, own or 48)
    seen = widths[0] + (widths[1] if scale > 1 else 0)
    assert made.padding([request]) == pytest.approx(1 - (tokens[0] + (tokens[1] if scale > 1 else 0)) / seen)
    assert resolve(spec.to_json() | {"family": None, "step_indices": spec.step_indices}) == spec


def test_a_text_is_cut_once_however_often_it_is_asked_for(tokenizer):
    cut: list[str] = []

    def counting(text: str) -> dict[str, list[int]]:
        cut.append(text)
        return tokenizer(text)

    made = collator(counting, true_cfg_scale=4.0)
    requests = [made.asked(Prompt(text=text), member=member) for member in range(3) for text in ("a cat", "a dog")]
    assert len(requests) == 6 and len(cut) == len(set(cut)) == 3, "the two, and the negative prompt"
    with pytest.raises(RequestError, match="text tokens, the fixed width is 24"):
        made.asked(Prompt(text="cat " * 39 + "cat"))


def _widths(spec: SamplingSpec) -> tuple[int, int]:
    return spec.prompt_width, spec.negative_prompt_width


@pytest.mark.parametrize("kind", [Width.bucketed, Width.natural])
def test_a_width_that_is_asked_for_stays_and_a_text_past_the_most_is_refused(tokenizer, kind):
    made = Collator("qwen_image", tokenizer, SamplingConfig(height=64, width=64), CollateConfig(prompt_width=24, width=kind))
    assert _widths(made.asked(Prompt(text="a cat"), {"prompt_width": 20}).spec)[0] == 20
    with pytest.raises(RequestError, match="the fixed width is 24"):
        made.groups([Prompt(text="cat " * 40)], 1, 1)


def test_a_family_that_attends_to_padding_has_one_width(tokenizer):
    with pytest.raises(RequestError, match=r"collate.width=natural: wan2_2 attends to padding.*collate.width=fixed"):
        Collator("wan2_2", tokenizer, SamplingConfig(), CollateConfig(width=Width.natural))
