"""Values recorded once, before the shared code learned of other families: Qwen-Image's own must never move.

Ids, seeds, specs and weights are the same on every machine. What was computed by matrix products is compared on a machine like
the one it was recorded on. `python tests/parity/test_golden.py` records both anew, for a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from omni_rollout.config import CollateConfig, EvaluationConfig, SamplingConfig
from omni_rollout.data.collate import Collator, derive_seed
from omni_rollout.data.prompts import group_id, load_prompts
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import onednn_isa
from omni_rollout.launch.compose import compose
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.models.qwen_image.spec import resolve, schedule, text_tokens
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.train import train
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.trajectories.digest import combined_digest, tensor_digest
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "golden"
CHECKPOINT = str(ROOT / "recipes" / "nano" / "checkpoint")
CAPSULE = FOLDER / "format_1.safetensors"
TENSORS = ("latents", "log_probs", "step_indices", "sigmas", "timesteps", "prompt_embeds", "prompt_embeds_mask")
NEGATIVE = ("negative_prompt_embeds", "negative_prompt_embeds_mask")


def digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def machine() -> dict[str, Any]:
    """What decides which kernels a product takes."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": [told.get(key) for key in ("vendor_id", "cpu family", "model")],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": onednn_isa(),
        "cuda": torch.cuda.is_available(),
        "torch": torch.__version__,
    }


def requests(prompt_width: int = 16) -> list[RolloutRequest]:
    """A guided and an unguided image, of one group."""
    sampling = {"height": 64, "width": 64, "num_inference_steps": 5, "prompt_width": prompt_width, "negative_prompt_width": 8}
    return [
        RolloutRequest(
            request_id=f"golden-{member:02d}",
            prompt=Prompt(text='a red sign that says "42"', metadata={"text": "42"}),
            spec=resolve({**sampling, "true_cfg_scale": scale, "step_indices": (1, 2)}),
            seed=1234 + member,
            group_id="golden",
            member=member,
        )
        for member, scale in enumerate((4.0, 1.0))
    ]


def everywhere() -> dict[str, Any]:
    """The same on every machine."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, subfolder="tokenizer")
    prompts = load_prompts(ROOT / "recipes" / "nano" / "data" / "train.jsonl")[:3]
    sampling = SamplingConfig(height=64, width=64, num_inference_steps=10, true_cfg_scale=1.0, sde_window_size=2)
    collator = Collator("qwen_image", tokenizer, sampling, CollateConfig(prompt_width=16))
    asked = collator.groups(prompts, 7, 2)
    evaluated = collator.evaluation(prompts, EvaluationConfig(images=4), "before")
    specs = [one.spec.to_json() for one in (asked[0], evaluated[0], *requests())]
    held = [capsule_digests(load_capsule(CAPSULE))] if CAPSULE.exists() else []
    return {
        "group_ids": [group_id(prompt) for prompt in prompts],
        "derived_seed": derive_seed(3, "group", 1),
        "requests": [[one.request_id, one.seed, one.group_id, list(one.spec.step_indices)] for one in (*asked, *evaluated)],
        # Keys that came later say nothing about Qwen-Image.
        "specs": [
            {key: value for key, value in spec.items() if (key, value) not in (("family", "qwen_image"), ("extra", {}))}
            for spec in specs
        ],
        "text_tokens": [text_tokens(tokenizer, prompt.text, requests()[0].spec) for prompt in prompts],
        "weights": {
            dtype: combined_digest({n: tensor_digest(t) for n, t in effective_weights(load_policy(CHECKPOINT, kind), kind)})
            for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        "weight_names": digest(sorted(n for n, _ in effective_weights(load_policy(CHECKPOINT, torch.float32), torch.float32))),
        "capsule": held,
    }


def capsule_digests(trajectory: Trajectory) -> dict[str, Any]:
    found = {name: digest(getattr(trajectory, name)) for name in (*TENSORS, *NEGATIVE) if getattr(trajectory, name) is not None}
    image = torch.from_numpy(trajectory.image.copy())
    words = [trajectory.prompt.text, dict(trajectory.prompt.metadata), trajectory.seed, trajectory.group_id, trajectory.member]
    return {**found, "image": digest(image), "words": words, "initial_noise": trajectory.fingerprint["initial_noise"]}


def sampled(folder: Path | None = None) -> dict[str, Any]:
    """What an engine computes on the nano model, and two steps of training on it. One thread."""
    values: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        with RolloutEngine(CHECKPOINT, dtype=dtype, max_num_seqs=2) as engine:
            found = sorted(engine.generate(requests()), key=lambda one: one.member)
        kind = getattr(torch, dtype)
        scored = recompute(load_policy(CHECKPOINT, kind), found, family="qwen_image", dtype=kind, micro_batch_size=3)
        assert all(torch.equal(one.log_probs, own) for one, own in zip(found, scored, strict=True))
        values[dtype] = [capsule_digests(one) for one in found]
        if folder is not None and dtype == "bfloat16":
            save_capsule(replace(found[0], fingerprint={**found[0].fingerprint, "versions": {}}), folder / CAPSULE.name)
    return values


def demo() -> list[dict[str, float]]:
    """metrics.jsonl of two steps of the demo, less its clocks."""
    with tempfile.TemporaryDirectory() as folder:
        small = ["rollout.group_size=4", "rollout.prompts_per_step=2", "trainer.steps=2", "evaluation.images=2", "threads=1"]
        train(compose(["experiment=nano_ocr", f"run_dir={folder}/run", "wandb.mode=disabled", *small]))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("timing", "perf/"))} for line in lines]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alike() -> dict[str, Any]:
    recorded = json.loads((FOLDER / "machine.json").read_text())
    if recorded["machine"] != machine():
        pytest.skip(f"recorded on {recorded['machine']}, this is {machine()}")
    return recorded


def test_what_no_machine_changes():
    recorded = json.loads((FOLDER / "everywhere.json").read_text())
    found = json.loads(json.dumps(everywhere()))
    assert recorded.keys() == found.keys()
    for name, value in recorded.items():
        assert found[name] == value, name


def test_the_schedule_and_the_noise_of_the_old_capsule():
    trajectory = load_capsule(CAPSULE)
    config = json.loads((Path(CHECKPOINT) / "scheduler" / "scheduler_config.json").read_text())
    built = schedule(trajectory.spec, config)
    assert torch.equal(built.sigmas, trajectory.sigmas) and torch.equal(built.timesteps, trajectory.timesteps)
    noise = torch.randn((1, 1, 16, 8, 8), generator=torch.Generator().manual_seed(trajectory.seed))  # frames, then channels
    packed = noise.view(1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 64)
    assert tensor_digest(packed)[:16] == trajectory.fingerprint["initial_noise"]


def test_what_the_engine_samples(alike, one_thread):
    found = sampled()
    for dtype in ("float32", "bfloat16"):
        for ours, theirs in zip(found[dtype], alike["sampled"][dtype], strict=True):
            assert ours == theirs


def test_the_demo(alike, one_thread):
    for ours, theirs in zip(demo(), alike["demo"], strict=True):
        assert {key: ours.get(key) for key in theirs} == theirs


def test_the_old_capsule_holds_on_this_trainer(one_thread):
    """Up to rounding: it was sampled with another GELU, before the one whose bits no thread and no length decides."""
    trajectory = load_capsule(CAPSULE)
    policy = load_policy(CHECKPOINT, torch.bfloat16)
    (scored,) = recompute(policy, [trajectory], family="qwen_image", dtype=torch.bfloat16, micro_batch_size=1)
    torch.testing.assert_close(scored, trajectory.log_probs, rtol=0, atol=2e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    computed = {"machine": machine(), "sampled": sampled(None if CAPSULE.exists() else FOLDER), "demo": demo()}
    (FOLDER / "machine.json").write_text(json.dumps(computed, indent=1) + "\n")
    (FOLDER / "everywhere.json").write_text(json.dumps(everywhere(), indent=1) + "\n")
