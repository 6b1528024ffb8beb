"""The probe on a sound pair: zero in every cell, a size for every cause; and `replay` of capsules, good and bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omni_rollout.config import TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.nano.random_weights import build_random
from omni_rollout.parity import reported
from omni_rollout.parity.matrix import Matrix
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.types import Prompt, RolloutRequest

QUICK = Matrix.parse(["guidance=1.0,4.0", "width=natural,64", "in_flight=3,staggered", "images=4"])
# On this model, per dtype: the rules whose breaking changes bits. A rule about bf16 rounding has nothing to break in fp32.
COSTLY = {
    "float32": {
        "mask_dropped",
        "latent_storage",
        "log_prob_reduction",
        "constant_shape",
        "attention_backend",
        "lora_application",
    },
    "bfloat16": {
        *("mask_dropped", "timestep_cast", "rms_norm", "rope", "layer_norm", "contiguity", "latent_storage"),
        *("attention_backend", "guidance_dtype", "width_trimmed", "log_prob_reduction", "lora_application"),
    },
}


def config_of(checkpoint: str) -> TrainConfig:
    config = TrainConfig()
    config.model.path = checkpoint
    return config


@pytest.fixture(scope="module")
def written(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, str]:
    folder = tmp_path_factory.mktemp("parity")
    status = reported.parity(config_of(checkpoint), json_path=folder / "out.json", html_path=folder / "out.html", matrix=QUICK)
    return status, json.loads((folder / "out.json").read_text()), (folder / "out.html").read_text()


def test_every_cell_is_zero_and_the_status_says_so(written):
    status, report, _ = written
    assert status == 0 and report["exact"] and report["findings"] == []
    assert len(report["cells"]) == 2 * 2 * 2 * 2
    for cell in report["cells"]:
        assert (cell["kl"], cell["kl_nats"], cell["max_abs_diff"], cell["clip_fraction"]) == (0, 0, 0, 0)
        assert cell["bitwise_equal_fraction"] == 1 and cell["log_probs"] >= 4 * 5
        assert [step["kl"] for step in cell["steps"]] == [0] * len(cell["steps"])


def test_staggered_cells_saw_batches_of_several_sizes(written):
    _, report, _ = written
    staggered = [cell for cell in report["cells"] if cell["in_flight"] == "staggered" and cell["prompt_width"] == 64]
    assert staggered and all(len(cell["batch_sizes"]) > 1 for cell in staggered)
    natural = [cell["widths"] for cell in report["cells"] if cell["prompt_width"] == "natural"]
    assert all(len(widths) > 1 and max(widths) < 64 for widths in natural)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_cause_has_a_size(written, dtype):
    _, report, _ = written
    causes = {cause["name"]: cause for cause in report["causes"] if cause["dtype"] == dtype}
    assert causes["compile"]["not_run"] and causes["compile"]["kl"] is None
    assert {name for name, cause in causes.items() if cause["max_abs_diff"]} >= COSTLY[dtype]
    assert all(causes[name]["kl"] != 0 for name in COSTLY[dtype])
    sizes = [cause["mean_abs_diff"] for cause in report["causes"] if cause["dtype"] == dtype and not cause["not_run"]]
    assert sizes == sorted(sizes, reverse=True)
    assert report["baselines"][dtype]["bitwise_equal_fraction"] == 1


def test_the_page_needs_no_network(written):
    _, report, page = written
    assert page.count("<svg") == 4 and "http" not in page and "src=" not in page
    assert all(cause["name"] in page for cause in report["causes"])


def test_an_ode_is_refused_before_an_engine_starts(checkpoint):
    config = config_of(checkpoint)
    config.sampling.noise_level = 0.0
    with pytest.raises(UserError, match="no log-probs"):
        reported.parity(config, matrix=QUICK)


@pytest.fixture(scope="module")
def capsules(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    from omni_rollout.models.qwen_image.spec import resolve

    folder = tmp_path_factory.mktemp("capsules")
    with RolloutEngine(checkpoint, dtype="bfloat16", max_num_seqs=2) as engine:
        requests = [
            RolloutRequest(
                request_id=f"r{number}",
                prompt=Prompt(text="a cat"),
                spec=resolve({"height": 64, "width": 64, "num_inference_steps": 4, "true_cfg_scale": 4.0, "prompt_width": 32}),
                seed=number,
                group_id="g",
                member=number,
            )
            for number in range(2)
        ]
        for trajectory in engine.generate(requests):
            save_capsule(trajectory, folder / f"{trajectory.request_id}.safetensors")
    yield sorted(folder.iterdir())


def replay(capsules: list[Path], config: TrainConfig, tmp_path: Path) -> tuple[int, list[dict]]:
    status = reported.replay(capsules, config, json_path=tmp_path / "replay.json")
    return status, json.loads((tmp_path / "replay.json").read_text())["capsules"]


def test_capsules_hold_in_their_own_dtype(capsules, checkpoint, tmp_path):
    config = config_of(checkpoint)  # says float32; the capsules say bfloat16
    status, results = replay(capsules, config, tmp_path)
    assert status == 0
    assert [(result["status"], result["not_honoured"], result["kl"]) for result in results] == [("equal", [], 0)] * 2


def test_a_corrupt_capsule_is_refused_by_name_and_the_others_go_on(capsules, checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(capsules[0].read_bytes()[:-100])
    status, results = replay(
        [capsules[0], broken, tmp_path / "absent.safetensors", capsules[1]], config_of(checkpoint), tmp_path
    )
    assert status == 1
    assert [result["status"] for result in results] == ["equal", "refused", "refused", "equal"]
    assert "broken.safetensors" in results[1]["refused"] and "absent.safetensors" in results[2]["refused"]
    out = capsys.readouterr().out
    assert "broken.safetensors" in out and "2 of 4 capsules hold" in out


def test_other_weights_are_named_and_the_gap_given(capsules, tmp_path):
    other = build_random(tmp_path / "other", layers=3, seed=4)
    status, (result,) = replay(capsules[:1], config_of(str(other)), tmp_path)
    assert status == 1 and result["status"] == "different" and result["max_abs_diff"] > 0
    assert [field.split()[0] for field in result["not_honoured"]] == ["weights"]


def test_another_architecture_is_refused_before_it_crashes(capsules, tmp_path):
    other = build_random(tmp_path / "wide", layers=1, joint_dim=96)
    status, (result,) = replay(capsules[:1], config_of(str(other)), tmp_path)
    assert status == 1 and result["status"] == "refused" and "prompt_embeds has 64 channels" in result["refused"]


def test_another_version_is_named_but_the_bits_decide(capsules, checkpoint, tmp_path):
    from dataclasses import replace

    trajectory = load_capsule(capsules[0])
    versions = {**trajectory.fingerprint["versions"], "torch": "1.0"}
    path = tmp_path / "old.safetensors"
    save_capsule(replace(trajectory, fingerprint={**trajectory.fingerprint, "versions": versions}), path)
    status, (result,) = replay([path], config_of(checkpoint), tmp_path)
    assert status == 0 and result["not_honoured"] == [f"versions.torch (1.0, here {torch.__version__})"]


def test_one_wrong_bit_is_enough(capsules, checkpoint, tmp_path):
    from dataclasses import replace

    trajectory = load_capsule(capsules[0])
    log_probs = trajectory.log_probs.clone()
    log_probs.view(torch.int32)[1] += 1
    path = tmp_path / "bit.safetensors"
    save_capsule(replace(trajectory, log_probs=log_probs), path)
    status, (result,) = replay([path], config_of(checkpoint), tmp_path)
    assert status == 1 and result["status"] == "different" and result["bitwise_equal_fraction"] == pytest.approx(2 / 3)


def test_the_true_width_has_cells_of_its_own_and_the_size_of_its_cause(checkpoint, tmp_path, capsys):
    built = []

    def small(out: Path, *, family: str, layers: int, heads: int, head_dim: int) -> Path:
        """What it is called with, in a size for tests."""
        built.append((layers, heads, head_dim, out))
        return build_random(out, layers=1, heads=2)

    matrix = Matrix.parse(["dtype=bfloat16", "guidance=4.0", "width=64", "in_flight=3", "images=3", "true_width=true"])
    status = reported.parity(config_of(checkpoint), json_path=tmp_path / "out.json", matrix=matrix, build_random=small)
    report = json.loads((tmp_path / "out.json").read_text())
    ((layers, heads, head_dim, folder),) = built
    assert status == 0 and (layers, heads * head_dim) == (1, 3072) and not folder.exists()
    assert [cell["model"] for cell in report["cells"]] == [checkpoint, *["one random block of 24 x 128"] * 2]
    own = [cause["name"] for cause in report["causes"] if cause["model"] != checkpoint]
    assert own == ["constant_shape"] and "one random block" in capsys.readouterr().out


def test_a_model_of_that_width_is_not_measured_twice(checkpoint, monkeypatch):
    monkeypatch.setattr("omni_rollout.models.qwen_image.probe.TRUE_WIDTH", (1, 128))
    words = ["dtype=bfloat16", "guidance=4.0", "width=64", "in_flight=3", "images=1", "causes=false", "true_width=true"]
    matrix = Matrix.parse(words)
    assert reported.parity(config_of(checkpoint), matrix=matrix, build_random=lambda *_, **__: pytest.fail("built")) == 0
