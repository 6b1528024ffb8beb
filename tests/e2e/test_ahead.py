"""`rollout.ahead=1` in one process: which policy samples what, what proves that, and that a run that goes on is the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from omni_rollout import train as loop
from omni_rollout.errors import EngineDiedError
from omni_rollout.launch.compose import compose
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.state import read_state
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.train import train
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import RolloutRequest, Trajectory

STEPS = 4
OF_THE_MACHINE = ("timing_s/", "perf/", "rollout/")


@pytest.fixture(scope="module")
def arguments(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na blue dog on a table\n")
    return lambda folder, *more: [
        f"model.path={random_checkpoint}",
        f"prompts={prompts}",
        f"run_dir={folder}",
        "collate.prompt_width=24",
        "sampling.height=64",
        "sampling.width=64",
        "sampling.num_inference_steps=4",
        "reward=jpeg_compressibility",
        "rollout.ahead=1",
        "rollout.group_size=4",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=4",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.warmup_steps=0",
        "trainer.schedule=constant",
        "trainer.ema_decay=0.9",
        "trainer.save_every=1",
        "trainer.keep_checkpoints=0",
        "evaluation.images=2",
        "evaluation.every=2",
        "wandb.mode=disabled",
        "threads=1",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Trajectory]]]:
    """A run, and all that it sampled, in the order in which it was finished."""
    folder, kept = tmp_path_factory.mktemp("whole") / "run", list[Trajectory]()

    class Watched(Journal):
        def keep(self, step: int, trajectory: Trajectory) -> None:
            super().keep(step, trajectory)
            kept.append(trajectory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Journal", Watched)
        train(compose(arguments(folder)))
    yield folder, kept


def lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["step"]]


def of_the_run(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(folder)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {f"{path.relative_to(folder)} {name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_each_step_learns_from_the_policy_of_one_update_earlier(whole):
    folder, kept = whole
    steps = {one.request_id: int(one.request_id.partition("-")[0]) for one in kept}
    assert sorted(set(steps.values())) == [1, 2, 3, 4] and len(kept) == 8 * STEPS
    assert {(steps[one.request_id], one.policy_version) for one in kept} == {(1, 0), (2, 0), (3, 1), (4, 2)}
    after = {step: read_state(folder / f"checkpoints/step_{step:05d}").weights for step in range(1, STEPS + 1)}
    assert len(set(after.values())) == STEPS, "every update changes the weights"
    sampled_by = {steps[one.request_id]: one.fingerprint["weights"] for one in kept}
    assert sampled_by == {1: sampled_by[2], 2: sampled_by[2], 3: after[1], 4: after[2]}
    assert {line["step"]: line["weights/digest"] for line in lines(folder)} == sampled_by


def test_the_parity_metrics_stay_exact_and_the_policies_are_told_apart(whole):
    folder, _ = whole
    rows = lines(folder)
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert {(row["parity/ppo_kl_mb0"], row["parity/bitwise_equal_fraction"]) for row in rows} == {(0.0, 1.0)}
    assert not any("kl_nonzero" in str(row.get("alerts/names", "")) for row in rows)
    assert rows[0]["rollout_corr/k3_kl"] == 0.0 == rows[0]["rollout_corr/logprob_abs_diff_max"]
    assert rows[0]["rollout_corr/rollout_is_mean"] == 1.0 == rows[0]["rollout_corr/rollout_is_eff_sample_size"]
    for row in rows[1:]:
        assert row["rollout_corr/k3_kl"] > 0.0 and 0 < row["rollout_corr/rollout_is_min"] < row["rollout_corr/rollout_is_max"]
        assert row["rollout_corr/rollout_is_max"] <= 2.0 and 0 < row["rollout_corr/rollout_is_eff_sample_size"] < 1
        assert row["actor/old_log_probs_recomputed"] == 1.0 and row["actor/ratio_mean"] == 1.0


def test_a_run_that_goes_on_samples_again_what_was_sampled_ahead(arguments, whole, tmp_path, capsys):
    folder, _ = whole
    elsewhere = tmp_path / "run"
    train(compose(arguments(elsewhere, f"trainer.resume={folder / 'checkpoints' / 'step_00002'}")))
    assert "0 finished trajectories kept" in capsys.readouterr().out
    assert [row["rollout/kept"] for row in lines(elsewhere)] == [0.0] * STEPS
    assert of_the_run(elsewhere) == of_the_run(folder)
    assert (elsewhere / "seeds.jsonl").read_bytes() == (folder / "seeds.jsonl").read_bytes()
    for name in ("images/step_0003.png", "images/step_0004.png", "images/evaluation_0004.png"):
        assert (elsewhere / name).read_bytes() == (folder / name).read_bytes(), name
    mine, expected = (tensors(one / "checkpoints" / "step_00004") for one in (elsewhere, folder))
    assert mine.keys() == expected.keys() and any(name.startswith("behaviour/") for name in mine)
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())


@contextmanager
def as_trained_now(self: Learner) -> Iterator[nn.Module]:
    yield self.engine.module


def test_a_comparison_with_any_other_policy_would_be_found(arguments, whole, tmp_path, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(Learner, "as_sampled", as_trained_now)
    start = f"trainer.resume={folder / 'checkpoints' / 'step_00002'}"
    train(compose(arguments(tmp_path / "run", start, "trainer.steps=3", "evaluation.images=0")))
    row = lines(tmp_path / "run")[-1]
    assert row["staleness"] == 1 and row["parity/bitwise_equal_fraction"] < 1 and row["parity/ppo_kl_mb0"] != 0.0
    assert "kl_nonzero" in str(row["alerts/names"])


def test_a_batch_lets_go_of_its_rewards_where_the_next_rollout_fails(arguments, tmp_path, monkeypatch):
    sample, before = RolloutEngine.generate, set(threading.enumerate())

    def dies_in_the_second(self: RolloutEngine, requests: Sequence[RolloutRequest], **more: Any) -> Iterator[Trajectory]:
        if requests[0].request_id.partition("-")[0].lstrip("0") == "2":
            raise EngineDiedError("in the rollout that is ahead")
        yield from sample(self, requests, **more)

    monkeypatch.setattr(RolloutEngine, "generate", dies_in_the_second)
    with pytest.raises(EngineDiedError, match="that is ahead"):
        train(compose(arguments(tmp_path / "run", "evaluation.images=0")))
    threads = [thread for thread in threading.enumerate() if thread.name == "rewards" and thread not in before]
    for thread in threads:
        thread.join(20)
    assert not [thread for thread in threads if thread.is_alive()]
