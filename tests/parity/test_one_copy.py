"""One process, LoRA: the weights that the adapter leaves alone are there once, and no bit of anything is another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_rollout.config import DType, ModelConfig, TrainConfig, TrainerConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.errors import WeightSyncError
from omni_rollout.models.qwen_image.policy import LORA_TARGETS, load_policy
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy import lora
from omni_rollout.policy.checkpoint import to_masters
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.recompute import recompute
from omni_rollout.policy.tensor_files import collected
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.digest import combined_digest, tensor_digest
from omni_rollout.types import Prompt, RolloutRequest

ADAPTED = tuple(f".{target}.weight" for target in LORA_TARGETS)


def in_bf16(checkpoint: Path) -> Path:
    for path in checkpoint.glob("transformer*/*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_bf16(build_random(tmp_path_factory.mktemp("bf16") / "checkpoint", seed=5))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(str(checkpoint), dtype=request.param, max_num_seqs=4) as made:
        yield made


@pytest.fixture
def learner(engine: RolloutEngine, checkpoint: Path) -> Learner:
    """On the engine's weights, which are the checkpoint's again."""
    made = Learner(config_of(checkpoint, engine.dtype), held=engine.policy_tensors())
    engine.update_weights(made.weights(), 0)
    return made


def config_of(checkpoint: Path, dtype: str, **trainer: Any) -> TrainConfig:
    settings: dict[str, Any] = {"lora_rank": 2, "learning_rate": 1e-2, "warmup_steps": 0, "clip_range": 10.0, **trainer}
    model = ModelConfig(path=str(checkpoint), dtype=DType(dtype))
    return TrainConfig(model=model, trainer=TrainerConfig(**settings))


def requests() -> list[RolloutRequest]:
    sizes = {"height": 64, "width": 64, "num_inference_steps": 4, "true_cfg_scale": 3.0, "prompt_width": 24}
    spec = resolve({**sizes, "negative_prompt_width": 16})
    return [
        RolloutRequest(request_id=f"{seed}", prompt=Prompt(text="a cat"), spec=spec, seed=seed, group_id="0", member=seed)
        for seed in range(2)
    ]


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def test_what_the_adapter_leaves_alone_is_the_engines_memory_and_nothing_else_is(engine, learner):
    held = engine.policy_tensors()
    own = {name.replace(".base_layer", ""): tensor for name, tensor in learner.policy.named_parameters() if "lora_" not in name}
    assert own.keys() == held.keys()
    for name, tensor in own.items():
        assert (memory(tensor) == memory(held[name])) == (not name.endswith(ADAPTED)), name
    storages = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    extra = [p for p in learner.policy.parameters() if p.untyped_storage().data_ptr() not in storages]
    adapted = sum(2 * tensor.numel() for name, tensor in own.items() if name.endswith(ADAPTED))  # bf16 as in the checkpoint
    assert sum(p.nbytes for p in extra) == adapted + sum(4 * p.numel() for p in learner.parameters)


def test_every_bit_is_that_of_fp32_masters(engine, learner, checkpoint):
    masters = load_policy(str(checkpoint), learner.dtype)
    to_masters(masters)
    factors = attach_lora(masters, rank=2)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(learner.parameters, factors, strict=True))
    with torch.no_grad():
        for both in zip(learner.parameters, factors, strict=True):
            noise = 0.1 * torch.randn(both[0].shape, generator=torch.Generator().manual_seed(both[0].numel()))
            for factor in both:
                factor.add_(noise)
    left, right = (dict(effective_weights(policy, learner.dtype)) for policy in (learner.policy, masters))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert any(not torch.equal(factor, factor.bfloat16()) for factor in factors), "a rounded factor would be seen"


def test_a_step_is_that_of_a_learner_with_all_of_its_own(engine, learner, checkpoint):
    trajectories = sorted(engine.generate(requests()), key=lambda one: one.seed)
    scored = recompute(learner.engine.module, trajectories, family="qwen_image", dtype=learner.dtype, micro_batch_size=2)
    assert all(torch.equal(a, b.log_probs) for a, b in zip(scored, trajectories, strict=True))

    apart = Learner(config_of(checkpoint, engine.dtype))
    before = {name: tensor.clone() for name, tensor in engine.policy_tensors().items()}
    for one in (learner, apart):
        old = [trajectory.log_probs for trajectory in trajectories]
        one.step(trajectories, torch.tensor([1.0, -1.0]), old, 1)
    left, right = (collected({**one.state(), **one.optimizer_state()}) for one in (learner, apart))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    now = engine.policy_tensors()
    assert all(torch.equal(before[name], now[name]) for name in now), "learning writes nothing into the engine"

    digest = engine.update_weights(learner.weights(), 1)
    assert digest == combined_digest({name: tensor_digest(tensor) for name, tensor in apart.weights()})
    changed = {name for name, tensor in engine.policy_tensors().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith(ADAPTED) for name in changed)


def test_a_sync_moves_what_is_adapted_alone(engine, learner, monkeypatch):
    moved: list[str] = []
    original = engine.pipeline.load_weights
    monkeypatch.setattr(
        engine.pipeline,
        "load_weights",
        lambda named: original(
            [(moved.append(name.removeprefix("transformer.")), (name, tensor))[1] for name, tensor in named]
        ),
    )
    engine.update_weights(learner.weights(), 1)
    assert sorted(moved) == sorted(name for name in engine.policy_tensors() if name.endswith(ADAPTED))


def test_an_engine_with_another_weight_is_not_shared_with(engine, learner, checkpoint):
    shared = engine.policy_tensors()["proj_out.weight"]
    kept = shared.clone()
    shared[0, 0] += 1
    try:
        with pytest.raises(WeightSyncError, match=r"proj_out\.weight: the engine holds another than the checkpoint"):
            Learner(config_of(checkpoint, engine.dtype), held=engine.policy_tensors())
    finally:
        shared.copy_(kept)


def test_full_weights_beside_an_average_are_fp32_masters_of_their_own(engine, checkpoint):
    held = engine.policy_tensors()
    engines = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    learner = Learner(config_of(checkpoint, engine.dtype, lora_rank=0, ema_decay=0.5), held=held)
    for parameter in learner.policy.parameters():
        assert parameter.dtype == torch.float32 and parameter.untyped_storage().data_ptr() not in engines


def test_without_the_guard_peft_would_round_the_factors(checkpoint, monkeypatch):
    """The mutant of `attach_lora`: that the test above can fail."""
    from contextlib import nullcontext

    monkeypatch.setattr(lora, "_seen_as_fp32", lambda layers: nullcontext())
    factors = attach_lora(load_policy(str(checkpoint), torch.bfloat16), rank=2)
    assert all(torch.equal(factor, factor.bfloat16().float()) for factor in factors)
