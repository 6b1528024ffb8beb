"""Trainer engines: DeepSpeed and PyTorch give the same numbers, skip the same updates, read each other's state."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from torch import nn

from omni_rollout.config import Offload, Schedule, TrainerConfig
from omni_rollout.config import TrainerEngineName as EngineName
from omni_rollout.policy.ema import ExponentialAverage
from omni_rollout.policy.tensor_files import collected
from omni_rollout.policy.trainer_engines import TrainerEngine, learning_rate_at, make_trainer_engine

ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]


def small_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def trainer_config(engine: str, zero_stage: int, **values: object) -> TrainerConfig:
    return TrainerConfig(engine=EngineName[engine], zero_stage=zero_stage, weight_decay=0.1, **values)  # type: ignore[arg-type]


def losses(module: nn.Module, update: int, micro_batches: int = 3) -> list[torch.Tensor]:
    """Real forward passes; the last block's text branch gets no gradient, as in training."""
    result = []
    for part in range(micro_batches):
        generator = torch.Generator().manual_seed(100 * update + part)
        velocity = module(
            hidden_states=torch.randn(2, 4, 8, generator=generator),
            encoder_hidden_states=torch.randn(2, 3, 12, generator=generator),
            encoder_hidden_states_mask=None,
            timestep=torch.rand(2, generator=generator),
            img_shapes=[[(1, 2, 2)]] * 2,
            return_dict=False,
        )[0]
        result.append((velocity**2).mean() / micro_batches)
    return result


def run_updates(trainer: TrainerEngine, updates: range, rate: float = 1e-2) -> list[float]:
    norms = []
    for update in updates:
        parts = losses(trainer.module, update)
        for index, part in enumerate(parts):
            trainer.backward(part, last=index == len(parts) - 1)
        norms.append(trainer.step(rate * (1 + update)))
    return norms


def make(engine: str, zero_stage: int, **values: object) -> tuple[QwenImageTransformer2DModel, TrainerEngine]:
    transformer = small_transformer()
    return transformer, make_trainer_engine(
        trainer_config(engine, zero_stage, **values), transformer, list(transformer.parameters())
    )


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    own = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, own[name]), name


@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e3], ids=["clipped", "free"])
def test_torch_engine_is_adamw_written_out(max_grad_norm: float) -> None:
    transformer, trainer = make("torch", 0, max_grad_norm=max_grad_norm)
    reference = small_transformer()
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    for update in range(3):
        sum(losses(reference, update)).backward()  # type: ignore[union-attr]
        for parameter in reference.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = float(nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm))
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + update)
        optimizer.step()
        optimizer.zero_grad()
        (norm,) = run_updates(trainer, range(update, update + 1))
        assert norm == pytest.approx(expected, rel=1e-5)
        assert (norm > max_grad_norm) == (max_grad_norm < 1)
    for mine, other in zip(transformer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e3], ids=["clipped", "free"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_gives_the_bits_of_torch(zero_stage: int, max_grad_norm: float) -> None:
    expected, torch_engine = make("torch", 0, max_grad_norm=max_grad_norm)
    transformer, trainer = make("deepspeed", zero_stage, max_grad_norm=max_grad_norm)
    assert run_updates(trainer, range(4)) == run_updates(torch_engine, range(4))
    assert_same_parameters(transformer, expected)
    assert not torch.equal(transformer.proj_out.weight, small_transformer().proj_out.weight)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_gradient_checkpointing_changes_no_bit(zero_stage: int) -> None:
    expected, torch_engine = make("torch", 0)
    transformer, trainer = make("deepspeed", zero_stage)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    assert run_updates(trainer, range(2)) == run_updates(torch_engine, range(2))
    assert_same_parameters(transformer, expected)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_a_norm_that_is_not_finite_skips_the_update_and_only_that(engine: str, zero_stage: int) -> None:
    expected, torch_engine = make("torch", 0)
    transformer, trainer = make(engine, zero_stage)
    run_updates(torch_engine, range(2))
    run_updates(trainer, range(1))
    before = [parameter.detach().clone() for parameter in transformer.parameters()]
    first, second = losses(trainer.module, 7, micro_batches=2)
    trainer.backward(first, last=False)
    trainer.backward(second * math.nan, last=True)
    assert math.isnan(trainer.step(1e-2))
    assert all(torch.equal(*pair) for pair in zip(before, transformer.parameters(), strict=True))
    run_updates(trainer, range(1, 2))
    assert_same_parameters(transformer, expected)


@pytest.mark.parametrize(("saver", "loader"), [(ENGINES[i], ENGINES[j]) for i, j in [(0, 2), (1, 0), (2, 3), (3, 1), (2, 2)]])
def test_state_of_one_engine_continues_in_another(saver: tuple[str, int], loader: tuple[str, int]) -> None:
    expected, whole = make(*saver)
    run_updates(whole, range(2))
    state = collected(whole.state_dict())
    transformer = small_transformer()
    transformer.load_state_dict(expected.state_dict())
    trainer = make_trainer_engine(trainer_config(*loader), transformer, list(transformer.parameters()))
    trainer.load_state_dict(state)
    loaded = collected(trainer.state_dict())
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert run_updates(trainer, range(2, 4)) == run_updates(whole, range(2, 4))
    assert_same_parameters(transformer, expected)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_state_before_the_first_step_and_state_that_does_not_fit(engine: str, zero_stage: int) -> None:
    _, trainer = make(engine, zero_stage)
    assert trainer.state_dict().keys() == {"step"}
    trainer.load_state_dict(collected(trainer.state_dict()))
    run_updates(trainer, range(1))
    state = collected(trainer.state_dict())
    first = next(name for name in state if name != "step")
    for broken, message in [
        ({name: value for name, value in state.items() if name != first}, f"has no {first}"),
        ({**state, first: state[first][:1]}, f"{first} is"),
        ({**state, "other.exp_avg": state[first]}, "other.exp_avg"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.load_state_dict(broken)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_a_step_without_a_last_backward_is_an_error(engine: str, zero_stage: int) -> None:
    _, trainer = make(engine, zero_stage)
    trainer.backward(losses(trainer.module, 0)[0], last=False)
    with pytest.raises(RuntimeError, match="last=True"):
        trainer.step(1e-2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "deepspeed", "zero_stage": -1}, "zero_stage=-1: expected 0, 1, 2 or 3"),
        ({"engine": "deepspeed", "zero_stage": 4}, "zero_stage=4"),
        ({"engine": "fsdp2"}, "one rank has nothing to cut"),
        ({"engine": "torch", "ranks": 2, "offload": "optimizer"}, "offload=optimizer: needs"),
        ({"engine": "deepspeed", "zero_stage": 0, "offload": "optimizer"}, "zero_stage of 1, 2 or 3"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload": "all"}, "offload=all: needs .*zero_stage=3"),
        ({"engine": "deepspeed", "ranks": 2}, "process group has 1"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    offload = Offload[values.pop("offload", "none")]
    config = TrainerConfig(**{**values, "engine": EngineName[values["engine"]], "offload": offload})
    transformer = small_transformer()
    with pytest.raises(ValueError, match=message):
        make_trainer_engine(config, transformer, list(transformer.parameters()))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_leaves_linear_layers_of_the_process_alone(zero_stage: int) -> None:
    before = torch.nn.functional.linear
    make("deepspeed", zero_stage)
    import deepspeed

    assert torch.nn.functional.linear is before
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_only_fp32_parameters_of_the_policy_are_trained(engine: str) -> None:
    transformer = small_transformer()
    config = trainer_config(engine, 1)
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainer_engine(config, transformer, [])
    with pytest.raises(ValueError, match="not a parameter of the policy"):
        make_trainer_engine(config, transformer, list(small_transformer().parameters()))
    with pytest.raises(ValueError, match="bfloat16"):
        make_trainer_engine(config, transformer.bfloat16(), list(transformer.parameters()))
    transformer.float().img_in.requires_grad_(False)
    with pytest.raises(ValueError, match=r"img_in\.weight is frozen"):
        make_trainer_engine(config, transformer, list(transformer.parameters()))


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = TrainerConfig(steps=21, warmup_steps=5, learning_rate=1e-3, schedule=Schedule.linear)
    rates = [learning_rate_at(config, step) for step in range(21)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[20] == pytest.approx(1e-4)
    falls = [one - other for one, other in pairwise(rates[4:])]
    assert falls == pytest.approx([9e-4 / 16] * 16)
    config.schedule = Schedule.constant
    assert [learning_rate_at(config, step) for step in range(5, 30)] == [1e-3] * 25


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (3, 5), (5, 5), (6, 5)])
def test_learning_rate_of_short_runs_stays_in_bounds(steps: int, warmup: int) -> None:
    config = TrainerConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0, schedule=Schedule.linear)
    rates = [learning_rate_at(config, step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    if steps > max(warmup, 1):
        assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
def test_average_follows_its_formula_and_swaps_back_bit_for_bit(engine: str, zero_stage: int) -> None:
    transformer, trainer = make(engine, zero_stage)
    expected, plain = make("torch", 0)
    average = ExponentialAverage(trainer, 0.75)
    by_hand = transformer.proj_out.weight.detach().double()
    for update in range(3):
        run_updates(trainer, range(update, update + 1))
        average.update()
        by_hand = 0.75 * by_hand + 0.25 * transformer.proj_out.weight.detach().double()
        own = [parameter.detach().clone() for parameter in transformer.parameters()]
        with pytest.raises(KeyError), average.swapped():
            torch.testing.assert_close(transformer.proj_out.weight.double(), by_hand, rtol=1e-6, atol=1e-7)
            raise KeyError
        assert all(torch.equal(*pair) for pair in zip(own, transformer.parameters(), strict=True))
    run_updates(plain, range(3))
    assert_same_parameters(transformer, expected)
    average.restart()
    with average.swapped():
        assert_same_parameters(transformer, expected)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_average_needs_a_decay_between_0_and_1(decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        ExponentialAverage(make("torch", 0)[1], decay)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_second_engine_after_the_process_group_was_destroyed(stage):
    for _ in range(2):
        layer = nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        engine = make_trainer_engine(trainer_config("deepspeed", stage), layer, list(layer.parameters()))
        engine.backward(engine.module(torch.ones(2, 4)).pow(2).sum(), last=True)
        engine.step(1e-2)
        assert not torch.equal(before, layer.weight)
        dist.destroy_process_group()
