"""Learning from a data set's images on the whole road: the trained nano model, its own VAE, drawn signs, nothing sampled."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from transformers import AutoTokenizer

from omni_rollout.algorithms.base import Samples
from omni_rollout.algorithms.diffusion_dpo import DiffusionDPO
from omni_rollout.algorithms.sft import SFT
from omni_rollout.cli import main
from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.data.stream import prompt_data
from omni_rollout.launch.compose import compose
from omni_rollout.launch.validate import validate
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.train import train
from omni_rollout.types import RolloutRequest, Trajectory

ROOT = Path(__file__).parents[2]
CHECKPOINT, DATA = ROOT / "recipes/nano/checkpoint", ROOT / "recipes/nano_offline/data"
STEPS = 10
OWN = ("trainer.warmup_steps=0", "trainer.schedule=constant", "evaluation.images=0", "wandb.mode=disabled", "threads=1")
OF_THE_MACHINE = ("timing_s/", "perf/")


def configured(experiment: str, folder: Path, *more: str) -> TrainConfig:
    config = compose([f"experiment={experiment}", f"run_dir={folder}", f"trainer.steps={STEPS}", *OWN, *more])
    validate(config)
    return config


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Seen:
    """What the loss was given, micro-batch by micro-batch, and what it gave."""

    samples: list[Samples] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    metrics: list[dict[str, torch.Tensor]] = field(default_factory=list)


def watched(kind: type[Any], patch: pytest.MonkeyPatch) -> Seen:
    seen, loss = Seen(), kind.sample_loss

    def watch(self: Any, samples: Samples) -> Any:
        values, metrics = loss(self, samples)
        seen.samples.append(samples)
        seen.values.append(values.detach())
        seen.metrics.append(dict(metrics))
        return values, metrics

    patch.setattr(kind, "sample_loss", watch)
    return seen


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Seen]]:
    folder = tmp_path_factory.mktemp("pairs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(DiffusionDPO, patch)
        train(configured("nano_offline_dpo", folder, "rollout.prompts_per_step=8"))
    yield folder, seen


@pytest.fixture(scope="module")
def latents() -> dict[str, torch.Tensor]:
    """sha256 of a picture of the data -> [16, 64] fp32: diffusers' own VAE on the CPU, patches of 2x2 written out."""
    torch.set_num_threads(1)
    vae = AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae")
    found = {}
    stream, _ = prompt_data(configured("nano_offline_dpo", Path("unused")))
    for image in {one.sha256: one for prompt in stream.prompts for one in prompt.targets}.values():
        pixels = np.asarray(Image.open(image.path).convert("RGB"), dtype=np.float32) / np.float32(255) * 2 - 1
        with torch.no_grad():
            moments = vae.encode(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None, :, None]).latent_dist.mean[0, :, 0]
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (vae.config.latents_mean, vae.config.latents_std))
        grid = ((moments - mean) / std).numpy()
        rows = [
            [grid[c, 2 * y + dy, 2 * x + dx] for c in range(16) for dy in range(2) for dx in range(2)]
            for y in range(4)
            for x in range(4)
        ]
        found[image.sha256] = torch.from_numpy(np.array(rows, dtype=np.float32))
    return found


def test_the_chosen_rise_above_the_rejected(pairs: tuple[Path, Seen]) -> None:
    accuracy = [line["actor/dpo_accuracy"] for line in lines(pairs[0])]
    margin = [line["actor/dpo_margin"] for line in lines(pairs[0])]
    assert accuracy[0] == 0 == margin[0], "the policy is the reference still: no pair is above 0"
    assert np.mean(accuracy[1:4]) < np.mean(accuracy[-3:]) and np.mean(accuracy[-3:]) > 0.8, accuracy
    assert np.mean(margin[1:4]) < np.mean(margin[-3:]), margin


def test_no_reward_is_asked_and_nothing_is_called_a_reward(pairs: tuple[Path, Seen]) -> None:
    for line in lines(pairs[0]):
        assert not [key for key in line if key.startswith("critic/")]
        assert line["parity/weights_equal"] == 1.0 and line["parity/seed_collisions"] == 0.0 and "alerts/names" not in line
    assert not (pairs[0] / "rollout").exists(), "an image is encoded again sooner than read"


def test_the_loss_is_the_papers_of_the_data_sets_own_latents(
    pairs: tuple[Path, Seen], latents: dict[str, torch.Tensor]
) -> None:
    stream, _ = prompt_data(configured("nano_offline_dpo", Path("unused")))
    asked = [tuple(latents[image.sha256] for image in prompt.targets) for prompt in stream.prompts]
    numbers = [pairs[1].samples, pairs[1].values, pairs[1].metrics]
    assert len(numbers[0]) >= STEPS
    for samples, values, metrics in zip(*numbers, strict=True):
        chosen, rejected = samples.x0[::2], samples.x0[1::2]
        for pair in zip(chosen, rejected, strict=True):
            assert any(all(torch.equal(one, other) for one, other in zip(pair, row, strict=True)) for row in asked)
        assert torch.equal(samples.noise[::2], samples.noise[1::2]) and torch.equal(samples.sigma[::2], samples.sigma[1::2])
        v, v_ref, x0, noise = (
            tensor.detach().double().numpy()
            for tensor in (samples.velocity, samples.reference_velocity, samples.x0, samples.noise)  # type: ignore[union-attr]
        )
        error, error_ref = (((one - (noise - x0)) ** 2).reshape(len(x0), -1).mean(1) for one in (v, v_ref))
        inner = -100 / 2 * ((error[::2] - error_ref[::2]) - (error[1::2] - error_ref[1::2]))
        assert np.allclose(values.numpy(), np.log1p(np.exp(-inner)), rtol=1e-4, atol=1e-5)
        assert np.allclose(metrics["dpo_margin"].numpy(), inner, rtol=1e-3, atol=2e-4)


def test_a_run_on_pairs_that_is_stopped_goes_on_to_the_last_bit(pairs: tuple[Path, Seen], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["experiment=nano_offline_dpo", f"run_dir={folder}", *OWN, "rollout.prompts_per_step=8"]
    starts = [[*words, "trainer.steps=8"], [*words, f"trainer.steps={STEPS}", "trainer.resume=auto"]]
    assert [main(["train", *start]) for start in starts] == [0, 0]
    assert_same(folder, pairs[0])
    typed = (folder / "command.txt").read_text().splitlines()
    assert [shlex.split(line) for line in typed] == [["omni-rollout", "train", *start] for start in starts]


def assert_same(folder: Path, other: Path, steps: int = STEPS) -> None:
    mine, theirs = (
        [{key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)} for line in lines(one)]
        for one in (folder, other)
    )
    assert mine == theirs
    last = f"checkpoints/step_{steps:05d}"
    files = [path.relative_to(other / last) for path in (other / last).rglob("*.safetensors")]
    assert files and all((folder / last / name).read_bytes() == (other / last / name).read_bytes() for name in files)


def test_sft_learns_the_pictures_with_lora_an_average_and_evaluations(
    tmp_path: Path, latents: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (DATA / "train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "train.jsonl").write_text("".join(f"{row}\n" for row in rows))
    shutil.copytree(DATA / "images", tmp_path / "images")
    own = [f"prompts={tmp_path}", "rollout.prompts_per_step=4", "algorithm.times=10", "trainer.micro_batch_size=20"]
    own += ["evaluation.images=1", "evaluation.prompts=null", "evaluation.every=4", "trainer.save_every=4", "trainer.steps=6"]
    own += ["trainer.lora_rank=4", "trainer.learning_rate=1e-2"]
    seen, folder = watched(SFT, monkeypatch), tmp_path / "run"
    train(configured("nano_offline_sft", folder, *own))
    found = lines(folder)
    assert "evaluation/ocr" in found[0] and "evaluation/ocr_ema" in found[-1]
    losses = [line["actor/pg_loss"] for line in found if "actor/pg_loss" in line]
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2]), losses
    first = seen.samples[:2]  # 4 pictures at 10 times
    errors = [((one.velocity.detach() - (one.noise - one.x0)).double() ** 2).mean().item() for one in first]
    assert np.isclose(losses[0], np.mean(errors), rtol=1e-6)
    stream, _ = prompt_data(configured("nano_offline_sft", folder, *own))
    expected = {latents[prompt.targets[0].sha256].numpy().tobytes() for prompt in stream.prompts}
    assert {x0.numpy().tobytes() for one in first for x0 in one.x0} == expected and len(expected) == 4
    again = tmp_path / "again"
    train(configured("nano_offline_sft", again, *own, f"trainer.resume={folder}/checkpoints/step_00004"))
    assert_same(again, folder, 6)


# ---- the engine


@pytest.fixture(scope="module")
def engine() -> Iterator[RolloutEngine]:
    torch.set_num_threads(1)
    with RolloutEngine(str(CHECKPOINT), max_num_seqs=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def requests() -> list[RolloutRequest]:
    """Two pairs of the data, and two images that are sampled."""
    config = configured("nano_offline_dpo", Path("unused"))
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, subfolder="tokenizer")
    collator = Collator("qwen_image", tokenizer, config.sampling, config.collate)
    stream, _ = prompt_data(config)
    sampled = prompt_data(configured("nano_diffusion_dpo", Path("unused")))[0].prompts[:1]
    return [*collator.groups(stream.prompts[:2], 1, 2), *collator.groups(sampled, 1, 2)]


def by_id(trajectories: Iterator[Trajectory]) -> dict[str, Trajectory]:
    return {one.request_id: one for one in trajectories}


def test_what_is_encoded_and_what_is_sampled_do_not_touch_each_other(
    engine: RolloutEngine, requests: list[RolloutRequest], latents: dict[str, torch.Tensor]
) -> None:
    together = by_id(engine.generate(requests))
    given, drawn = [one for one in requests if one.target], [one for one in requests if not one.target]
    apart = by_id(engine.generate(given)) | by_id(engine.generate(drawn))
    for request in requests:
        one, other = together[request.request_id], apart[request.request_id]
        assert torch.equal(one.latents, other.latents) and np.array_equal(one.media, other.media)
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
    for request in given:
        one = together[request.request_id]
        assert request.target is not None
        assert one.latents.shape == (1, 16, 64) and torch.equal(one.latents[0], latents[request.target.sha256])
        assert len(one.sigmas) == 11 and not len(one.log_probs) and one.fingerprint["target"] == request.target.sha256
        picture = np.asarray(Image.open(request.target.path).convert("RGB"), dtype=np.float64)
        assert np.abs(one.media - picture).mean() < 8, "what the monitor shows is what the VAE made of the picture"
    assert all("initial_noise" in together[one.request_id].fingerprint for one in drawn)


def test_a_picture_that_has_changed_since_it_was_read_is_refused_alone(
    engine: RolloutEngine, requests: list[RolloutRequest], tmp_path: Path
) -> None:
    request = requests[0]
    assert request.target is not None
    path = tmp_path / "changed.png"
    Image.new("RGB", (64, 64), "red").save(path)
    swapped = replace(request.prompt, targets=(replace(request.target, path=str(path)), *request.prompt.targets[1:]))
    errors: list[Exception] = []
    found = list(engine.generate([replace(request, prompt=swapped), requests[1]], lambda _, error: errors.append(error)))
    assert [one.request_id for one in found] == [requests[1].request_id]
    assert len(errors) == 1 and "its sha256 differs" in str(errors[0])
