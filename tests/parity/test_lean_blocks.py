"""The engine's own blocks compute, bit for bit, what vllm-omni's do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omni_rollout.diffusion import exact_ops
from omni_rollout.models.qwen_image import rollout as blocks
from omni_rollout.models.qwen_image.rollout import LeanAttention, LeanBlock
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.rollout.platform import linear
from omni_rollout.types import Trajectory
from tests.parity.conftest import Sides


def sampled(model: str, dtype: str) -> tuple[list[Trajectory], int]:
    """Eight mixed requests, guided or not, padded or not; and how many of the engine's blocks are lean."""
    sides = object.__new__(Sides)
    sides._count = 0
    with RolloutEngine(model, dtype=dtype, max_num_seqs=5) as engine:
        found = [isinstance(layer, LeanBlock | LeanAttention) for layer in engine.pipeline.modules()]
        return sorted(engine.generate(sides.mixed()), key=lambda made: made.request_id), sum(found)


def are_equal(some: list[Trajectory], others: list[Trajectory]) -> bool:
    return len(some) == len(others) > 4 and all(
        torch.equal(one.latents, other.latents) and torch.equal(one.log_probs, other.log_probs)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared_out", [2**20, 2**14, 1], ids=["together", "some apart", "in whole tensors"])
def test_no_bit_is_another_than_with_the_stock_blocks(checkpoint, dtype, shared_out, monkeypatch):
    for module in (blocks, exact_ops):
        monkeypatch.setattr(module, "SHARED_OUT", shared_out)
    lean, installed = sampled(checkpoint, dtype)
    monkeypatch.setattr(blocks, "install_lean_blocks", lambda transformer: None)
    stock, none = sampled(checkpoint, dtype)
    assert (installed, none) == (6, 0) and are_equal(lean, stock)


@pytest.mark.parametrize(
    "mutant", ["a norm that rounds before its weight", "a table that is rounded", "queries alone", "text that ends too early"]
)
def test_another_rounding_is_seen(checkpoint, mutant, monkeypatch):
    if mutant == "a norm that rounds before its weight":
        own = blocks._rms_normalised
        monkeypatch.setattr(blocks, "_rms_normalised", lambda x, weight, eps: own(x, torch.ones_like(weight), eps) * weight)
    elif mutant == "a table that is rounded":
        own_rotation = blocks.rotate_into

        def rounded(out: torch.Tensor, x: torch.Tensor, freqs: torch.Tensor) -> None:
            own_rotation(out, x, torch.complex(freqs.real.half().float(), freqs.imag))

        monkeypatch.setattr(blocks, "rotate_into", rounded)
    elif mutant == "text that ends too early":
        monkeypatch.setattr(LeanAttention, "text_ends", True)
    else:
        own_rotation = blocks.rotate_into

        def queries(out: torch.Tensor, x: torch.Tensor, freqs: torch.Tensor) -> None:
            out.copy_(x)
            own_rotation(out[:, :, :1], x[:, :, :1].contiguous(), freqs)

        monkeypatch.setattr(blocks, "rotate_into", queries)
    made, _ = sampled(checkpoint, "bfloat16")
    monkeypatch.undo()
    assert not are_equal(made, sampled(checkpoint, "bfloat16")[0])


def test_a_small_network_alone_keeps_packed_copies_of_wide_layers(monkeypatch):
    network, methods = nn.ModuleList([nn.Linear(1024, 1024), nn.Linear(64, 64)]), []
    for layer in network:
        layer.quant_method = linear.KeptWeightLinearMethod()  # type: ignore[assignment]
        methods.append(layer.quant_method)
    linear.spare_packed(network)
    assert all(method.packed is not None for method in methods)
    monkeypatch.setattr(linear, "SMALL", 2**20)
    linear.spare_packed(network)
    assert [method.packed is None for method in methods] == [True, False]
    linear.forget_packed(network)


def test_who_listens_to_the_modules_hears_the_stock_attention(checkpoint):
    """The parity probe names the norm or the rotation that differs, which lean attention does not call."""
    sides = object.__new__(Sides)
    sides._count = 0
    heard: list[str] = []
    with RolloutEngine(checkpoint, max_num_seqs=1) as engine:
        (quiet,) = engine.generate([sides.request(1, "a cat")])
        attention = next(layer for layer in engine.pipeline.modules() if isinstance(layer, LeanAttention))
        for name in ("norm_q", "rope"):
            attention.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.append(name))
        (listened,) = engine.generate([sides.request(1, "a cat")])
    assert set(heard) == {"norm_q", "rope"} and torch.equal(quiet.latents, listened.latents)


def test_what_becomes_of_the_text_after_the_last_block_is_left_out(checkpoint):
    sides = object.__new__(Sides)
    sides._count = 0
    heard: list[int] = []
    with RolloutEngine(checkpoint, max_num_seqs=1) as engine:
        stack = [layer for layer in engine.pipeline.modules() if isinstance(layer, LeanBlock)]
        for number, block in enumerate(stack):
            for layer in (block.txt_mlp, block.attn.to_add_out):
                layer.register_forward_hook(lambda *_, number=number: heard.append(number))
        list(engine.generate([sides.request(1, "a cat")]))
    assert len(stack) > 1 and set(heard) == set(range(len(stack) - 1))
