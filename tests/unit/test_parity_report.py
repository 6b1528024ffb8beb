"""The probe's arithmetic, its choice of settings, and its three reports, without an engine."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from omni_rollout.errors import UserError
from omni_rollout.models.base.causes import swapped
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.parity.attribution import CauseResult, culprits
from omni_rollout.parity.causes import causes
from omni_rollout.parity.findings import Finding, from_seeds, from_weights
from omni_rollout.parity.html import to_html
from omni_rollout.parity.matrix import Cell, Matrix, cells, submissions
from omni_rollout.parity.measure import Measure, measure, measure_steps
from omni_rollout.parity.report import print_report, to_json, verdict, write_json
from omni_rollout.parity.results import CellResult, Report
from omni_rollout.types import Prompt, Trajectory

CAUSES = causes("qwen_image")

CELL = Cell(dtype="float32", guidance=1.0, width="natural", in_flight="3")


def trajectory_of(log_probs: torch.Tensor, *, seed: int = 0, latents_seed: int = 0) -> Trajectory:
    steps = len(log_probs)
    spec = resolve({"height": 32, "width": 32, "num_inference_steps": steps + 1, "true_cfg_scale": 1.0, "prompt_width": 4})
    return Trajectory(
        latents=torch.randn(steps + 1, 4, 64, generator=torch.Generator().manual_seed(latents_seed)),
        log_probs=log_probs,
        step_indices=torch.arange(steps),
        sigmas=torch.linspace(1, 0, steps + 2),
        timesteps=torch.linspace(1000, 1, steps + 1),
        prompt_embeds=torch.zeros(4, 8),
        prompt_embeds_mask=torch.ones(4, dtype=torch.bool),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        media=np.zeros((32, 32, 3), np.uint8),
        prompt=Prompt(text="x"),
        spec=spec,
        seed=seed,
        group_id="g",
        member=seed,
        policy_version=0,
        fingerprint={},
    )


def measured(gap: float) -> Measure:
    rollout = torch.tensor([-1.0, -1.0])
    return measure([trajectory_of(rollout)], [rollout - torch.tensor([gap, gap])], 1e-4)


def report_of(gap: float, **changes: object) -> Report:
    steps = {0: measured(gap), 1: measured(0.0)}
    result = CellResult(
        model="a <model>",
        cell=CELL,
        measure=measured(gap),
        steps=steps,
        batch_sizes=(1, 3),
        widths=(5, 9),
        errors=(),
        findings=(),
    )
    causes = [
        CauseResult(model="a <model>", cause=CAUSES[0], dtype="float32", alone=measured(1e-4), cumulative=measured(1e-4)),
        CauseResult(model="a <model>", cause=CAUSES[1], dtype="float32", alone=measured(-1e-3), cumulative=measured(2e-3)),
        CauseResult(model="a <model>", cause=CAUSES[2], dtype="float32", not_run="no compiler"),
    ]
    report = Report(model="a <model>", parity="exact", clip_range=1e-4, environment={"device": "CPU"}, cells=[result])
    report.causes = causes
    for name, value in changes.items():
        setattr(report, name, value)
    return report


def test_the_units_of_the_kl():
    found = measured(0.5)
    assert found.kl == 0.5 and found.kl_nats == 0.5 * 4 * 64 and found.kl_over_clip == pytest.approx(5000)
    assert found.clip_fraction == 1 and found.bitwise_equal_fraction == 0 and found.log_probs == 2
    assert found.k3_kl == pytest.approx(np.exp(-0.5) - 0.5)


def test_opposite_gaps_cancel_in_the_kl_but_are_not_exact():
    rollout = torch.tensor([-1.0, -1.0])
    found = measure([trajectory_of(rollout)], [rollout + torch.tensor([0.25, -0.25])], 1e-4)
    assert found.kl == 0 and not found.exact and found.mean_abs_diff == 0.25 and found.k3_kl > 0


def test_equal_nans_and_nothing_at_all_are_not_exact():
    nan = torch.tensor([float("nan")])
    assert not measure([trajectory_of(nan)], [nan], 1e-4).exact
    assert not replace(measured(0.0), log_probs=0).exact


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.integers(0, 7))
def test_exact_means_every_bit(values, flipped):
    rollout = torch.tensor(values, dtype=torch.float32)
    assert measure([trajectory_of(rollout)], [rollout.clone()], 1e-4).exact
    other = rollout.clone()
    other.view(torch.int32)[flipped % len(values)] ^= 1
    assert not measure([trajectory_of(rollout)], [other], 1e-4).exact


def test_steps_are_told_apart_across_trajectories_of_different_length():
    long, short = trajectory_of(torch.tensor([-1.0, -2.0])), trajectory_of(torch.tensor([-1.0]))
    steps = measure_steps([long, short], [torch.tensor([-1.0, -2.5]), torch.tensor([-1.0])], 1e-4)
    assert {step: (found.log_probs, found.max_abs_diff) for step, found in steps.items()} == {0: (2, 0.0), 1: (1, 0.5)}


def test_the_default_matrix_is_the_whole_claim():
    found = [cell for dtype in Matrix().dtype for cell in cells(Matrix(), dtype)]
    assert len(found) == len(set(found)) == 2 * 2 * 3 * 4


@pytest.mark.parametrize("word", ["dtype=float16", "width=wide", "in_flight=0", "guidance=x", "images=0", "size=3", "dtype"])
def test_a_wrong_word_names_what_was_expected(word):
    with pytest.raises(UserError, match="expected"):
        Matrix.parse([word])


def test_submissions_hold_every_request_once():
    requests = list(range(8))
    assert list(submissions(CELL, requests)) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(submissions(replace(CELL, in_flight="staggered"), requests)) == [requests]


def test_shared_noise_is_found_whatever_the_log_probs():
    rollout = torch.tensor([-1.0])
    apart = [trajectory_of(rollout, seed=seed, latents_seed=seed) for seed in range(3)]
    assert from_seeds(apart) == []
    (finding,) = from_seeds([*apart, trajectory_of(rollout, seed=9, latents_seed=1)])
    assert finding.where == "seed" and finding.name == "g-01" and "g-09" in finding.what


def test_weights_name_the_first_tensors():
    assert from_weights([]) == []
    assert "a, b, c and 2 more" in from_weights(list("abcde"))[0].what


def test_a_cause_is_the_culprit_when_breaking_it_on_both_sides_heals():
    results = [
        CauseResult(model="a <model>", cause=CAUSES[0], dtype="bfloat16", alone=measured(0.1)),
        CauseResult(model="a <model>", cause=CAUSES[2], dtype="bfloat16", alone=measured(0.0)),
        CauseResult(model="a <model>", cause=CAUSES[3], dtype="bfloat16", not_run="x"),
    ]
    assert [finding.name for finding in culprits(measured(0.1), results)] == [CAUSES[2].name]
    assert culprits(measured(0.0), results) == []


def test_swapped_restores_an_inherited_and_an_own_attribute():
    class Base:
        value = 1

    class Child(Base):
        pass

    for owner in (Base, Child):
        with swapped(owner, "value", 2):
            assert owner.value == 2
        assert owner.value == 1
    assert "value" not in vars(Child)


def test_exact_only_when_nothing_at_all_was_found():
    assert report_of(0.0).exact
    assert not report_of(1e-7).exact
    assert not report_of(0.0, cells=[]).exact
    assert not report_of(0.0, findings=[("float32", Finding("input", "timestep", "cast"))]).exact
    (cell,) = report_of(0.0).cells
    assert not replace(cell, errors=("boom",)).exact
    assert not replace(cell, measure=None).exact


def test_json_has_the_published_keys_and_ranks_by_size(tmp_path):
    write_json(to_json(report_of(1e-7)), tmp_path / "new" / "out.json")
    value = json.loads((tmp_path / "new" / "out.json").read_text())
    published = {
        *("dtype", "true_cfg_scale", "prompt_width", "in_flight", "kl", "kl_nats"),
        *("clip_fraction", "bitwise_equal_fraction", "max_abs_diff"),
    }
    assert published <= value["cells"][0].keys() and value["cells"][0]["in_flight"] == 3
    assert [step["step_index"] for step in value["cells"][0]["steps"]] == [0, 1]
    assert [cause["name"] for cause in value["causes"]] == [CAUSES[1].name, CAUSES[0].name, CAUSES[2].name]
    assert value["causes"][2]["kl"] is None and value["causes"][2]["not_run"] == "no compiler"


def test_numbers_that_are_not_finite_become_null():
    report = report_of(float("nan"))
    assert not report.exact
    cell = to_json(report)["cells"][0]
    assert cell["kl"] is None and cell["bitwise_equal_fraction"] == 0
    json.dumps(to_json(report), allow_nan=False)


@pytest.mark.parametrize(("gap", "words"), [(0.0, "exactly 0 in all 1 cells"), (1e-3, "1 of 1 cells are not exact")])
def test_terminal_and_page_agree_on_the_verdict(gap, words):
    report = report_of(gap, findings=[] if gap == 0 else [("float32", Finding("module", "<b>img_in</b>", "differs"))])
    buffer = io.StringIO()
    print_report(report, Console(file=buffer, width=250))
    page = to_html(report)
    assert words in verdict(report) and words in buffer.getvalue() and words in page
    assert "a &lt;model&gt;" in page and "<b>img_in" not in page
    assert ("<b>img_in</b>" in buffer.getvalue()) == (gap != 0)
    assert all(cause.name in buffer.getvalue() and cause.name in page for cause in CAUSES[:3])
    assert "nan" not in page and page.count("<svg") == page.count("</svg>") == 2
