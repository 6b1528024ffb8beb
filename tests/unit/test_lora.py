"""LoRA: the forward uses the merged weight, and what is saved is what diffusers' own pipeline loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from peft.tuners import lora
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.config import TrainerEngineName as EngineName
from omni_rollout.diffusion.exact_ops import effective_weights, install_linears
from omni_rollout.diffusion.products import exact_linear
from omni_rollout.policy.lora import MergedLoraLinear, attach_lora, has_lora, load_lora, save_lora
from omni_rollout.policy.trainer_engines import make_trainer_engine


def stock_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def exact_transformer(dtype: torch.dtype = torch.float32) -> QwenImageTransformer2DModel:
    transformer = stock_transformer()
    install_linears(transformer, dtype)
    return transformer


def trained(rank: int = 3, alpha: int | None = 7) -> tuple[QwenImageTransformer2DModel, list[nn.Parameter]]:
    """B far from zero, as after training."""
    transformer = exact_transformer()
    parameters = attach_lora(transformer, rank=rank, alpha=alpha, seed=1)
    generator = torch.Generator().manual_seed(5)
    for factor_b in parameters[1::2]:
        factor_b.data.normal_(std=0.3, generator=generator)
    return transformer, parameters


def velocity(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return network(
        hidden_states=torch.randn(2, 4, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 3, 12, generator=generator),
        encoder_hidden_states_mask=None,
        timestep=torch.rand(2, generator=generator),
        img_shapes=[[(1, 2, 2)]] * 2,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_and_no_name(dtype: torch.dtype) -> None:
    base, transformer = exact_transformer(dtype), exact_transformer(dtype)
    attach_lora(transformer, rank=2, seed=0)
    expected = dict(effective_weights(base, dtype))
    mine = dict(effective_weights(transformer, dtype))
    assert mine.keys() == expected.keys() == dict(stock_transformer().named_parameters()).keys()
    for name, tensor in mine.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
    assert torch.equal(velocity(exact_transformer()), velocity(fp32_with_adapter()))


def fp32_with_adapter() -> nn.Module:
    transformer = exact_transformer()
    attach_lora(transformer, rank=2, seed=0)
    return transformer


@torch.no_grad()
def test_the_forward_is_that_of_the_merged_weights_bit_for_bit() -> None:
    transformer, _ = trained()
    merged = exact_transformer()
    merged.load_state_dict(dict(effective_weights(transformer, torch.float32)))
    assert torch.equal(velocity(transformer), velocity(merged))
    assert not torch.equal(velocity(transformer), velocity(exact_transformer()))


@torch.no_grad()
def test_in_bfloat16_the_merged_weight_is_rounded_once() -> None:
    transformer = exact_transformer(torch.bfloat16)
    parameters = attach_lora(transformer, rank=2, alpha=3, seed=0)
    generator = torch.Generator().manual_seed(5)
    for factor_b in parameters[1::2]:
        factor_b.normal_(std=0.3, generator=generator)
    assert all(parameter.dtype == torch.float32 for parameter in transformer.parameters())
    sent = dict(effective_weights(transformer, torch.bfloat16))
    x = torch.randn(5, 16, generator=generator).bfloat16()
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, MergedLoraLinear)}
    assert len(layers) == 2 * 8
    for name, layer in layers.items():
        base, factors = layer.get_base_layer(), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        exact = base.weight.double() + 1.5 * (factors[1].double() @ factors[0].double())
        weight = sent[f"{name}.weight"]
        half_unit = torch.finfo(torch.bfloat16).eps / 2
        assert bool(((weight.double() - exact).abs() <= exact.abs() * half_unit * (1 + 1e-3) + 1e-9).all()), name
        assert torch.equal(layer(x), exact_linear(x, weight, sent[f"{name}.bias"])), name


def test_gradients_reach_the_factors_alone_and_are_those_of_the_merged_weight() -> None:
    transformer, parameters = trained(rank=3, alpha=7)
    merged = exact_transformer()
    merged.load_state_dict(dict(effective_weights(transformer, torch.float32)))
    for network in (transformer, merged):
        (velocity(network) ** 2).mean().backward()
    assert {id(p) for p in transformer.parameters() if p.grad is not None} <= {id(p) for p in parameters}
    assert [p.requires_grad for p in parameters] == [True] * len(parameters)
    own = dict(merged.named_modules())
    seen = 0
    for name, layer in transformer.named_modules():
        if not isinstance(layer, lora.Linear) or own[name].weight.grad is None:
            continue
        whole, a, b = own[name].weight.grad, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, 7 / 3 * whole @ a.T, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(a.grad, 7 / 3 * b.T @ whole, rtol=1e-4, atol=1e-7)
        seen += 1
    assert seen == 15  # of 16: the last block's text output leads nowhere


def test_factors_depend_on_the_seed_alone() -> None:
    def factors(seed: int, noise: int) -> list[torch.Tensor]:
        transformer = exact_transformer()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        result = attach_lora(transformer, rank=4, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return [factor.detach() for factor in result]

    first, again, other = factors(0, noise=1), factors(0, noise=2), factors(3, noise=1)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(not factor_b.any() for factor_b in first[1::2])
    deviation = torch.cat([factor_a.flatten() for factor_a in first[0::2]]).std()
    assert 0.22 < float(deviation) < 0.28  # 1 / rank


def test_alpha_defaults_to_twice_the_rank() -> None:
    transformer, _ = trained(rank=3, alpha=None)
    assert {layer.scaling["default"] for layer in transformer.modules() if isinstance(layer, lora.Linear)} == {2.0}


def stock_pipeline() -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=stock_transformer(),
    )


@torch.no_grad()
def test_a_stock_pipeline_loads_what_was_saved(tmp_path: Path) -> None:
    transformer, _ = trained(rank=3, alpha=7)
    save_lora(transformer, tmp_path / "lora", transformer.state_dict())
    pipeline = stock_pipeline()
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = velocity(transformer)
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=1e-5, atol=1e-5)
    difference = float((velocity(stock_transformer()) - expected).abs().max())
    assert difference > 0.1, difference


def test_load_brings_back_every_bit_with_or_without_an_adapter(tmp_path: Path) -> None:
    transformer, parameters = trained(rank=3, alpha=7)
    save_lora(transformer, tmp_path, transformer.state_dict())
    fresh, attached = exact_transformer(), exact_transformer()
    attach_lora(attached, rank=3, alpha=7, seed=9)
    for other in (fresh, attached):
        loaded = load_lora(other, tmp_path)
        assert all(torch.equal(*pair) for pair in zip(loaded, parameters, strict=True))
        assert torch.equal(velocity(other), velocity(transformer))


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    transformer, _ = trained(rank=3, alpha=7)
    save_lora(transformer, tmp_path, transformer.state_dict())
    other_rank = exact_transformer()
    attach_lora(other_rank, rank=2, alpha=7)
    with pytest.raises(ValueError, match=r"rank 3 and alpha 7.*rank 2 and alpha 7"):
        load_lora(other_rank, tmp_path)
    deeper = QwenImageTransformer2DModel.from_config({**stock_transformer().config, "num_layers": 3})
    install_linears(deeper, torch.float32)
    with pytest.raises(ValueError, match=r"another model.*no transformer_blocks\.2"):
        load_lora(deeper, tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_lora(exact_transformer(), tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_lora(transformer, tmp_path / "file", {})


def test_where_an_adapter_cannot_go_it_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank=0"):
        attach_lora(exact_transformer(), rank=0)
    plain = stock_transformer()
    with pytest.raises(ValueError, match="is a Linear: expected ExactLinear"):
        attach_lora(plain, rank=1)
    assert not has_lora(plain) and all(parameter.requires_grad for parameter in plain.parameters())
    transformer, _ = trained()
    with pytest.raises(ValueError, match="already"):
        attach_lora(transformer, rank=1)
    with pytest.raises(ValueError, match="Linear is no transformer of qwen_image"):
        attach_lora(nn.Linear(2, 2), rank=1)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_trains_an_adapter_with_the_bits_of_torch(zero_stage: int) -> None:
    results = []
    for name in (EngineName.torch, EngineName.deepspeed):
        transformer = exact_transformer()
        parameters = attach_lora(transformer, rank=2, seed=0)
        trainer = make_trainer_engine(TrainerConfig(engine=name, zero_stage=zero_stage), transformer, parameters)
        for _ in range(3):
            trainer.backward((velocity(trainer.module) ** 2).mean(), last=False)
            trainer.backward((velocity(trainer.module) - 1).abs().mean(), last=True)
            trainer.step(1e-2)
        results.append(dict(effective_weights(transformer, torch.float32)))
    base = dict(effective_weights(exact_transformer(), torch.float32))
    assert all(torch.equal(results[0][name], results[1][name]) for name in base)
    changed = {name.rpartition(".")[0].split(".attn.")[-1] for name in base if not torch.equal(results[1][name], base[name])}
    assert changed == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
