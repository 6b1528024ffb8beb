"""Kept trajectories: each comes back whole or is sampled again, whatever a crash or a change left of it."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_rollout.trajectories import capsule
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec, Trajectory

EXPECTED = {"dtype": "float32", "parity": "exact", "weights": "ab" * 32}
STEP, GROUP = 7, 4


def request(member: int) -> RolloutRequest:
    spec = SamplingSpec(
        height=16, width=16, num_inference_steps=3, true_cfg_scale=1.0, negative_prompt=None, noise_level=0.7,
        sde_type="sde", log_prob_form="gaussian", step_indices=(0, 1), prompt_width=4, negative_prompt_width=4,
    )  # fmt: skip
    prompt = Prompt(text="a red cat", metadata={"text": "cat", "n": 1.5})
    group = "00007-000-abc"
    return RolloutRequest(
        request_id=f"{group}-{member:02d}", prompt=prompt, spec=spec, seed=2**60 + member, group_id=group, member=member
    )


def finished(asked: RolloutRequest) -> Trajectory:
    generator = torch.Generator().manual_seed(asked.seed)
    return Trajectory(
        latents=torch.randn(3, 1, 8, generator=generator),
        log_probs=torch.randn(2, generator=generator),
        step_indices=torch.tensor([0, 1]),
        sigmas=torch.tensor([1.0, 0.7, 0.4, 0.0]),
        timesteps=1000 * torch.tensor([1.0, 0.7, 0.4]),
        prompt_embeds=torch.randn(4, 5, generator=generator).bfloat16(),
        prompt_embeds_mask=torch.tensor([True, True, False, False]),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        media=np.random.default_rng(asked.member).integers(0, 256, (16, 16, 3), np.uint8),
        prompt=asked.prompt,
        spec=asked.spec,
        seed=asked.seed,
        group_id=asked.group_id,
        member=asked.member,
        policy_version=6,
        fingerprint={**EXPECTED, "versions": {"torch": version("torch")}, "batch_sizes": [2, 1], "initial_noise": "cd"},
    )


def same(one: Trajectory, other: Trajectory) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Trajectory)]
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, torch.Tensor)
        else np.array_equal(a, b) and a.dtype == b.dtype
        if isinstance(a, np.ndarray)
        else a == b
        for a, b in pairs
    )


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_request_is_taken_or_sampled_never_both_and_never_damaged(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    journal = Journal(tmp_path_factory.mktemp("run"))
    requests = [request(member) for member in range(GROUP)]
    kept = data.draw(st.sets(st.integers(0, GROUP - 1)))
    torn = data.draw(st.sets(st.sampled_from(sorted(kept)))) if kept else set()
    for member in kept:
        journal.keep(STEP, finished(requests[member]))
    for member in torn:
        path = journal._step(STEP) / f"{requests[member].request_id}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    taken, left = journal.take(STEP, requests, EXPECTED, 6)
    assert [t.member for t in taken] == sorted(kept - torn)
    assert [r.member for r in left] == sorted(set(range(GROUP)) - (kept - torn))
    assert all(same(trajectory, finished(requests[trajectory.member])) for trajectory in taken)
    assert journal.take(STEP, left, EXPECTED, 6)[0] == [], "what did not load is gone"


@pytest.mark.parametrize(
    ("asked", "expected", "policy_version", "name"),
    [
        ({}, {**EXPECTED, "weights": "00" * 32}, 6, "weights"),
        ({}, {**EXPECTED, "parity": "fast"}, 6, "parity"),
        ({}, EXPECTED, 5, "policy_version"),
        ({"seed": 1}, EXPECTED, 6, "seed"),
        ({"prompt": Prompt(text="a red cat", metadata={"text": "dog", "n": 1.5})}, EXPECTED, 6, "prompt"),
        ({"spec": replace(request(0).spec, noise_level=0.5)}, EXPECTED, 6, "spec"),
    ],
)
def test_what_was_sampled_otherwise_is_sampled_again(tmp_path, capsys, asked, expected, policy_version, name):
    journal = Journal(tmp_path)
    journal.keep(STEP, finished(request(0)))
    changed = replace(request(0), **asked)
    assert journal.take(STEP, [changed], expected, policy_version) == ([], [changed])
    assert f"does not fit: its {name} is" in capsys.readouterr().out


def test_another_version_of_a_package_is_another_sample(tmp_path, capsys):
    other = finished(request(0))
    Journal(tmp_path).keep(STEP, replace(other, fingerprint={**other.fingerprint, "versions": {"torch": "1.0"}}))
    assert Journal(tmp_path).take(STEP, [request(0)], EXPECTED, 6)[0] == []
    assert "its versions is {'torch': '1.0'}" in capsys.readouterr().out


def test_steps_are_forgotten_when_a_checkpoint_holds_them(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 10):
        journal.keep(step, finished(request(step)))
    assert journal.count(after=1) == 2
    journal.forget(2)
    assert journal.count(after=0) == 1 and (tmp_path / "rollout" / "step_00010").is_dir()


def test_a_full_disk_gives_its_room_back_and_says_so_once(tmp_path, monkeypatch):
    journal, write = Journal(tmp_path), capsule.write_whole
    journal.keep(STEP, finished(request(0)))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capsule, "write_whole", full)
    journal.keep(STEP, finished(request(1)))
    monkeypatch.setattr(capsule, "write_whole", write)
    journal.keep(STEP, finished(request(2)))
    assert "No space left" in str(journal.failure) and journal.count(after=0) == 0
    journal.take(STEP + 1, [], EXPECTED, 7)
    assert journal.failure is None, "the next step tries again"


def test_nothing_is_written_where_nothing_is_to_be_kept(tmp_path):
    Journal(tmp_path, keep=False).keep(STEP, finished(request(0)))
    assert list(tmp_path.iterdir()) == []
