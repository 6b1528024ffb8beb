"""Checkpoints: every bit comes back, diffusers loads them, damage is named, a crash leaves the last good one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.config import TrainerEngineName as EngineName
from omni_rollout.diffusion.exact_ops import install_linears
from omni_rollout.errors import UserError
from omni_rollout.policy import checkpoint
from omni_rollout.policy.checkpoint import (
    OPTIMIZER,
    RNG,
    load_generators,
    load_policy,
    save_policy,
)
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.state import STATE, RunState, verify
from omni_rollout.policy.tensor_files import pending
from omni_rollout.policy.trainer_engines import TrainerEngine, make_trainer_engine

LORA = "lora/pytorch_lora_weights.safetensors"


def transformer_of(seed: int) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    install_linears(transformer, torch.bfloat16)  # the masters stay fp32, and it is they that are saved
    return transformer


def adapted(seed: int) -> tuple[QwenImageTransformer2DModel, list[nn.Parameter]]:
    transformer = transformer_of(0)
    return transformer, attach_lora(transformer, rank=2, seed=seed)


def shake(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def train_step(trainer: TrainerEngine, parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.stack([(p * torch.randn(p.shape, generator=generator)).sum() for p in parameters]).sum()
    trainer.backward(loss, last=True)
    trainer.step(1e-2)


def state_of(transformer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in transformer.named_parameters() if p.requires_grad}


def save(folder: Path, transformer: nn.Module, step: int, **more: Any) -> None:
    run = RunState(step=step, weights=f"digest {step}", lines={"metrics.jsonl": step}, config={"trainer.steps": 9})
    more = {"optimizer": pending({"step": torch.tensor(step)}), **more}
    save_policy(folder, transformer, pending(state_of(transformer)), run=run, **more)


def test_full_weights_come_back_and_diffusers_loads_the_fp32_masters(tmp_path: Path) -> None:
    transformer = transformer_of(0)
    save(tmp_path / "step_7", transformer, 7)
    other = transformer_of(1)
    assert not same(transformer, other)
    run = load_policy(tmp_path / "step_7", other).run
    assert (run.step, run.weights, run.lines, run.config) == (7, "digest 7", {"metrics.jsonl": 7}, {"trainer.steps": 9})
    assert same(transformer, other)
    stock = QwenImageTransformer2DModel.from_pretrained(tmp_path / "step_7" / "transformer")
    assert {name: p.dtype for name, p in stock.named_parameters()} == dict.fromkeys(stock.state_dict(), torch.float32)
    assert stock.state_dict().keys() == transformer.state_dict().keys() and same(transformer, stock)


def test_adapter_comes_back_and_a_pipeline_loads_it(tmp_path: Path) -> None:
    transformer, parameters = adapted(seed=1)
    shake(parameters, 1)
    save(tmp_path / "c", transformer, 1)
    assert not (tmp_path / "c" / "transformer").exists()
    for other in (adapted(seed=2)[0], transformer_of(0)):
        load_policy(tmp_path / "c", other)
        assert same(transformer, other)
    stock = QwenImageTransformer2DModel.from_config(transformer.config)
    pipeline = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, stock)
    pipeline.load_lora_weights(tmp_path / "c" / "lora")
    factor = pipeline.transformer.transformer_blocks[0].attn.to_q.lora_B["default_0"].weight
    assert torch.equal(factor, transformer.transformer_blocks[0].attn.to_q.lora_B["default"].weight)


def average_of(transformer: QwenImageTransformer2DModel, parameters: list[nn.Parameter]) -> ExponentialAverage:
    return ExponentialAverage(make_trainer_engine(TrainerConfig(), transformer, parameters), 0.5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_average_is_saved_beside_the_weights_and_comes_back(tmp_path: Path, lora: bool) -> None:
    transformer, parameters = adapted(0) if lora else (transformer_of(0), [])
    average = average_of(transformer, parameters or list(transformer.parameters()))
    shake(parameters or list(transformer.parameters()), 1)
    average.update()
    save(tmp_path / "c", transformer, 1, average=pending(average.parts))
    other, others = adapted(3) if lora else (transformer_of(3), [])
    other_average = average_of(other, others or list(other.parameters()))
    saved = load_policy(tmp_path / "c", other)
    assert saved.average is not None and saved.average.keys() == average.parts.keys()
    other_average.load(saved.average)
    assert same(transformer, other)
    with average.swapped(), other_average.swapped():
        assert same(transformer, other)
        averaged = [parameter.detach().clone() for parameter in transformer.parameters()]
    assert any(not torch.equal(*pair) for pair in zip(averaged, transformer.parameters(), strict=True))


@pytest.mark.parametrize("engine", [("torch", 0), ("deepspeed", 1), ("deepspeed", 2)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, engine: tuple[str, int], lora: bool) -> None:
    config = TrainerConfig(engine=EngineName[engine[0]], zero_stage=engine[1])

    def fresh(seed: int) -> tuple[QwenImageTransformer2DModel, list[nn.Parameter]]:
        transformer, parameters = adapted(seed) if lora else (transformer_of(seed), [])
        return transformer, parameters or list(transformer.parameters())

    transformer, parameters = fresh(0)
    trainer = make_trainer_engine(config, transformer, parameters)
    for step in range(2):
        train_step(trainer, parameters, step)
    save(tmp_path / "c", transformer, 2, optimizer=trainer.state_dict())
    resumed, resumed_parameters = fresh(1)
    state = load_policy(tmp_path / "c", resumed)
    resumed_trainer = make_trainer_engine(config, resumed, resumed_parameters)
    resumed_trainer.load_state_dict(state.optimizer)
    train_step(trainer, parameters, 2)
    train_step(resumed_trainer, resumed_parameters, 2)
    assert same(transformer, resumed)


def test_a_damaged_or_missing_file_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "c", transformer_of(0), 1)
    other, before = transformer_of(1), transformer_of(1)
    weights = tmp_path / "c" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model\.safetensors is not what was saved"):
        load_policy(tmp_path / "c", other)
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is missing"):
        load_policy(tmp_path / "c", other)
    assert same(other, before)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c", transformer_of(0), 1)
    with pytest.raises(ValueError, match=r"full weights.*lora_rank=0"):
        load_policy(tmp_path / "c", adapted(0)[0])
    deeper = QwenImageTransformer2DModel.from_config({**transformer_of(0).config, "num_layers": 2})
    with pytest.raises(ValueError, match=r"another model.*no transformer_blocks\.1"):
        load_policy(tmp_path / "c", deeper)
    with pytest.raises(ValueError, match=r"state\.json does not exist"):
        load_policy(tmp_path / "nowhere", transformer_of(0))
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        load_policy(tmp_path / "c", transformer_of(0))


def test_weights_of_an_engine_with_flat_buffers_take_no_more_room(tmp_path: Path) -> None:
    transformer = transformer_of(0)
    save(tmp_path / "before", transformer, 0)
    make_trainer_engine(TrainerConfig(engine=EngineName.deepspeed, zero_stage=1), transformer, list(transformer.parameters()))
    save(tmp_path / "after", transformer, 0)
    files = [tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors" for name in ("before", "after")]
    assert files[0].stat().st_size == files[1].stat().st_size


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = transformer_of(0), transformer_of(1)
    save(tmp_path / "last", first, 1)

    def full_disk(path: Path) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoint, "_sync", full_disk)
        save(tmp_path / "last", second, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["last"], "nothing of the one that failed takes room"
    other = transformer_of(2)
    assert load_policy(tmp_path / "last", other).run.step == 1 and same(other, first)
    save(tmp_path / "last", second, 2)
    assert load_policy(tmp_path / "last", other).run.step == 2 and same(other, second)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_weights_too_large_for_one_file_are_cut_and_diffusers_puts_them_together(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "FILE_SIZE", 4096)
    transformer, other = transformer_of(0), transformer_of(1)
    save(tmp_path / "c", transformer, 1)
    assert len(list((tmp_path / "c" / "transformer").glob("*.safetensors"))) > 2
    load_policy(tmp_path / "c", other)
    assert same(transformer, other)
    assert same(transformer, QwenImageTransformer2DModel.from_pretrained(tmp_path / "c" / "transformer"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "c"
    save(folder, adapted(0)[0], 1)
    return folder


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from([OPTIMIZER, RNG, STATE, LORA]))
def test_any_flipped_bit_is_found(written: Path, share: float, bit: int, name: str) -> None:
    path = written / name
    before = path.read_bytes()
    content = bytearray(before)
    content[int(share * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        with pytest.raises(UserError, match=path.name):
            verify(written)
    finally:
        path.write_bytes(before)
    verify(written)


def test_the_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        values = [random.random(), random.gauss(), float(np.random.random()), float(np.random.normal())]
        return [*values, float(torch.rand(()))]

    draw()  # leaves one of a pair of Gaussian numbers behind, in both
    save(tmp_path / "c", transformer_of(0), 1)
    expected = [draw(), draw()]
    load_generators(tmp_path / "c")
    assert [draw(), draw()] == expected
