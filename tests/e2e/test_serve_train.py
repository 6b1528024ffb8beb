"""A run whose engine is a server has the numbers of a run with its own engine, also when the server is killed meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.rollout import remote
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.train import train
from tests.e2e.serving import LIMIT, Serving
from tests.e2e.test_resume import files, of_the_run

STEPS = 2
TOKEN = "a secret of sixteen letters".replace(" ", "-")
MODEL = ["collate.prompt_width=24", "sampling.height=64", "sampling.width=64", "sampling.num_inference_steps=5"]


def run(model: Path, folder: Path, *more: str) -> list[str]:
    (folder.parent / "prompts.txt").write_text("a red cat\na blue dog on a table\n")
    return [
        f"model.path={model}",
        f"prompts={folder.parent / 'prompts.txt'}",
        f"run_dir={folder}",
        *MODEL,
        "sampling.true_cfg_scale=2.0",
        "reward=jpeg_compressibility",
        "rollout.group_size=8",
        "rollout.prompts_per_step=2",
        "rollout.max_num_seqs=4",
        f"trainer.steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "evaluation.images=2",
        "wandb.mode=disabled",
        "threads=1",
        *more,
    ]


@pytest.fixture(scope="module")
def own(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with an engine of its own, in another process: a server's trainer has none either."""
    folder = tmp_path_factory.mktemp("own") / "run"
    train(compose(run(random_checkpoint, folder)))
    return folder


def serving(model: Path, log: Path, port: int = 0, **environment: str) -> Serving:
    return Serving([f"model.path={model}", *MODEL, "rollout.max_num_seqs=4"], log, port, **environment)


def test_a_run_with_a_server_is_the_same_run(random_checkpoint, own, tmp_path, monkeypatch):
    """And with a secret, without which it answers nobody."""
    with serving(random_checkpoint, tmp_path / "log", OMNI_ROLLOUT_TOKEN=TOKEN) as server:
        for headers in ({}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"}):
            answer = httpx.post(f"{server.url}/v1/rollouts", json={"requests": [{"prompt": "x"}]}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["param"] == "authorization"
        with pytest.raises(UserError, match="401: authorization"):
            RemoteEngine(server.url)
        monkeypatch.setenv("OMNI_ROLLOUT_TOKEN", TOKEN)
        with pytest.raises(UserError, match="it serves dtype float32, here bfloat16"):
            train(compose(run(random_checkpoint, tmp_path / "other", f"rollout.url={server.url}", "model.dtype=bfloat16")))
        train(compose(run(random_checkpoint, tmp_path / "run", f"rollout.url={server.url}")))
        sizes = factors_sent(monkeypatch)
        train(compose(run(random_checkpoint, tmp_path / "lora", f"rollout.url={server.url}", "trainer.lora_rank=2")))
    adapted = [line for line in of_the_run(tmp_path / "lora") if line["step"]]
    assert [line["parity/bitwise_equal_fraction"] for line in adapted] == [1.0] * STEPS
    assert len({line["weights/digest"] for line in adapted}) == STEPS and len(sizes) == STEPS + 1 and max(sizes) < 200_000
    lines = of_the_run(tmp_path / "run")
    assert [line["parity/ppo_kl_mb0"] for line in lines if line["step"]] == [0.0] * STEPS
    assert lines == of_the_run(own)
    saved = f"checkpoints/step_{STEPS:05d}/transformer"
    assert files(tmp_path / "run", "*.png", "seeds.jsonl") == files(own, "*.png", "seeds.jsonl")
    assert files(tmp_path / "run" / saved, "*") == files(own / saved, "*") != {}


def factors_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each file that is sent from now on: the model has 2.6 MB."""
    sizes, original = list[int](), remote.write

    def write(path: str, *args: Any) -> str:
        digest = original(path, *args)
        sizes.append(Path(path).stat().st_size)
        return digest

    monkeypatch.setattr(remote, "write", write)
    return sizes


@pytest.mark.slow
def test_kill_9_of_the_server_in_mid_rollout_costs_the_run_nothing(random_checkpoint, own, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    first = serving(random_checkpoint, log)
    port = int(first.url.rpartition(":")[2])
    command = [sys.executable, "-m", "omni_rollout.cli", "train", *run(random_checkpoint, folder, f"rollout.url={first.url}")]
    with (tmp_path / "train").open("wb") as out:
        trainer = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        kept = folder / "rollout" / f"step_{STEPS:05d}"
        end = time.monotonic() + LIMIT
        while not any(kept.glob("*.safetensors")):
            assert trainer.poll() is None and time.monotonic() < end, (tmp_path / "train").read_text()[-3000:]
            time.sleep(0.005)
        memory = Path(httpx.get(f"{first.url}/v1/models").json()["data"][0]["omni_rollout"]["shared_memory"])
        first.stop(signal.SIGKILL)
        finished = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
        assert 1 <= len(finished) < 16, "in the midst of a rollout"
        with serving(random_checkpoint, log, port):
            assert trainer.wait(LIMIT) == 0, (tmp_path / "train").read_text()[-3000:]
        assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}.items()
    finally:
        trainer.kill()
        first.process.kill()
    assert of_the_run(folder) == of_the_run(own)
    saved = f"checkpoints/step_{STEPS:05d}/transformer"
    assert files(folder / saved, "*") == files(own / saved, "*")
    assert not memory.exists()


@pytest.mark.slow
def test_two_servers_are_one_engine_and_one_that_dies_is_replaced_by_the_other(random_checkpoint, own, tmp_path):
    folder = tmp_path / "run"
    servers = [serving(random_checkpoint, tmp_path / f"log{number}") for number in range(2)]
    urls = ",".join(server.url for server in servers)
    overrides = run(random_checkpoint, folder, f"'rollout.url=\"{urls}\"'".strip("'"))
    command = [sys.executable, "-m", "omni_rollout.cli", "train", *overrides]
    with (tmp_path / "train").open("wb") as out:
        trainer = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        kept, end = folder / "rollout" / f"step_{STEPS:05d}", time.monotonic() + LIMIT
        while not any(kept.glob("*.safetensors")):
            assert trainer.poll() is None and time.monotonic() < end, (tmp_path / "train").read_text()[-3000:]
            time.sleep(0.005)
        assert all(server.metrics()["request_success_total"] for server in servers), "both sampled"
        servers[0].stop(signal.SIGKILL)
        assert trainer.wait(LIMIT) == 0, (tmp_path / "train").read_text()[-3000:]
    finally:
        trainer.kill()
        for server in servers:
            server.process.kill()
    assert of_the_run(folder) == of_the_run(own)
