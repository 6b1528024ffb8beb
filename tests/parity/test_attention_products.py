"""Attention of many tokens as products: a sample's bits are its own, the trainer's are the engine's, the formula is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speed.stages import BY_PRODUCTS
from omni_rollout.diffusion import attention_products
from omni_rollout.diffusion.attention import exact_attention
from omni_rollout.diffusion.attention_products import MANY, attention_by_products, by_products
from omni_rollout.diffusion.machine import on_one_thread
from omni_rollout.models.base.causes import Setting
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.parity.causes import compiled_blocks
from omni_rollout.parity.trace import pairs, recorded_steps, trace
from omni_rollout.policy.recompute import Pair, score

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "float32_by_onednn", lambda: True)


@pytest.fixture(params=[1, 2, 3, 5, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(batch: int, queries: int, keys: int, heads: int, head_dim: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (queries, keys, keys)
    return [torch.randn(batch, length, heads, head_dim, generator=generator) * 2 for length in lengths]


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhst,bthd->bshd", shares / shares.sum(-1, keepdim=True), value)


def unpadded(batch: int, keys: int) -> torch.Tensor:
    return torch.arange(keys).expand(batch, -1) % torch.arange(5, 5 + batch)[:, None] != 2


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 1300),
    keys=st.integers(3, 90),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    masked=st.booleans(),
)
def test_result_and_gradients_are_those_of_the_formula(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, masked: bool
) -> None:
    parts = [part.requires_grad_() for part in random(batch, queries, keys, heads, head_dim)]
    wide = [part.detach().double().requires_grad_() for part in parts]
    mask = unpadded(batch, keys) if masked else None
    gradient = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1))
    ours, expected = attention_by_products(parts[0], parts[1], parts[2], mask), formula(wide[0], wide[1], wide[2], mask)
    assert (ours - expected).abs().max() < 2e-5
    found, wanted = torch.autograd.grad(ours, parts, gradient), torch.autograd.grad(expected, wide, gradient.double())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-4 * max(1, other.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "heads", "head_dim"), [(272, 272, 6, 128), (1040, 77, 2, 32), (300, 300, 3, 64)])
def test_neither_company_nor_place_nor_layout_changes_a_bit(
    dtype: torch.dtype, queries: int, keys: int, heads: int, head_dim: int, threads: int
) -> None:
    parts = [part.to(dtype) for part in random(3, queries, keys, heads, head_dim)]
    mask = unpadded(3, keys)
    together = attention_by_products(parts[0], parts[1], parts[2], mask)
    for sample in range(3):
        query, key, value = (part[sample : sample + 1] for part in parts)
        assert torch.equal(attention_by_products(query, key, value, mask[sample : sample + 1])[0], together[sample])
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    assert torch.equal(attention_by_products(strided[0], strided[1], strided[2], mask[:, None, None]), together)
    everyone = torch.ones_like(mask)
    assert torch.equal(
        attention_by_products(parts[0], parts[1], parts[2], everyone), attention_by_products(parts[0], parts[1], parts[2], None)
    )


def test_a_thread_that_computes_alone_has_the_bits_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its others, which it has again for as long: on some machines one thread would give the same bits by itself."""
    before, own, multiplied = torch.get_num_threads(), attention_products.onednn, []

    def onednn(*given: Any) -> torch.Tensor:
        multiplied.append(torch.get_num_threads())
        return own(*given)

    torch.set_num_threads(2)
    query, key, value = random(2, 1040, 1040, 2, 64)
    expected = attention_by_products(query, key, value, None)
    monkeypatch.setattr(attention_products, "onednn", onednn)
    with on_one_thread():
        found, inside = attention_by_products(query, key, value, None), torch.get_num_threads()
    torch.set_num_threads(before)
    assert torch.equal(found, expected) and inside == 1 and set(multiplied) == {2}


@pytest.mark.parametrize("several", [1, 2])
def test_how_many_heads_are_copied_at_a_time_changes_no_bit(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, mask = [part.requires_grad_() for part in random(2, 300, 77, 5, 16)], unpadded(2, 77)

    def results() -> list[torch.Tensor]:
        made = attention_by_products(parts[0], parts[1], parts[2], mask)
        return [made, *torch.autograd.grad(made.pow(2).sum(), parts)]

    together = results()
    monkeypatch.setattr(attention_products, "COPIED", several * (300 + 2 * 77) * 16)
    assert len(list(attention_products._groups(parts[0], parts[1]))) == 2 * (5 if several == 1 else 3)
    assert all(map(torch.equal, results(), together))


def test_what_is_given_is_not_written_over() -> None:
    parts = random(1, 300, 300, 1, 64)
    copies = [part.clone() for part in parts]
    attention_by_products(parts[0], parts[1], parts[2], None)
    assert all(map(torch.equal, parts, copies))


def test_the_sizes_of_a_sample_decide_and_not_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.empty(40, 255, 1, 8), torch.empty(1, 256, 1, 8)
    assert MANY == 256**2 and not by_products(few, few, None) and by_products(many, many, None)
    everyone = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    assert by_products(many, many, everyone) and not by_products(many, many, everyone.float())
    assert not by_products(many, many, everyone.expand(1, 1, 256, 256))  # a row for each query
    monkeypatch.setattr(attention_products, "float32_by_onednn", lambda: False)
    assert not by_products(many, many, None)


def test_the_kernel_is_not_asked_for_many_tokens() -> None:
    def kernel(*_: Any) -> torch.Tensor:
        raise AssertionError("asked")

    query, key, value = random(2, 256, 256, 1, 32)
    exact_attention(kernel, query, key, value, None)
    with pytest.raises(AssertionError, match="asked"):
        exact_attention(kernel, query[:, :64], key[:, :64], value[:, :64], None)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of queries of each call."""
    own, seen = attention_products._by_head, []

    def by_head(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return own(x)

    monkeypatch.setattr(attention_products, "_by_head", by_head)
    return seen


def test_the_bench_knows_it_by_its_name() -> None:
    assert attention_products._Attention.__name__ == BY_PRODUCTS


def large(sides: Any) -> list[Any]:
    """272 and 288 tokens, padded and not, guided and not."""
    size = {"height": 256, "width": 256, "num_inference_steps": 2}
    return [
        sides.request(0, "a photo of a cat", **size),
        sides.request(1, "dog", **size, prompt_width=16),
        sides.request(2, 'a red sign that says "42"', **size, true_cfg_scale=4.0),
        sides.request(3, "dog", **size),
    ]


def velocities(sides: Any, made: list[Any], steps: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each trajectory's first step, by the engine, where all were in flight together, and by the trainer, each alone."""
    of_engine = [next(step.velocity for step in steps if torch.equal(step.before[0], one.latents[0])) for one in made]
    with torch.no_grad():
        of_trainer = [score(sides.policy, [one], [Pair(0, 0)], "qwen_image", sides.dtype).velocity for one in made]
    return of_engine, of_trainer


def test_the_trainer_scores_what_the_engine_sampled_bit_for_bit(
    sides: Any, all_equal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    with recorded_steps(sides.pipeline) as steps:
        made = sides.generate(large(sides))
    of_engine = len(seen)
    assert all_equal(*velocities(sides, made, steps))
    assert of_engine and len(seen) > of_engine and set(seen) == {272, 288}
    assert all_equal(sides.score(made, 3), [trajectory.log_probs for trajectory in made])


def test_the_kernel_on_one_side_alone_is_seen(sides: Any, all_equal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_steps(sides.pipeline) as steps:
        made = sides.generate(large(sides))
    monkeypatch.setattr("omni_rollout.diffusion.attention.by_products", lambda *_: False)
    assert not all_equal(*velocities(sides, made, steps))


def test_the_probe_hears_it(sides: Any) -> None:
    (request,) = large(sides)[:1]
    followed = trace(sides.engine, sides.policy, request, "qwen_image", sides.dtype)
    (_, _, of_engine, of_trainer), *_ = pairs(followed)
    name = "transformer_blocks.1.attn scaled_dot_product_attention"
    assert torch.equal(of_engine[0].outputs[name], of_trainer[0].outputs[name])
    assert of_engine[0].outputs[name].shape[2] == 288


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_trainer_still_multiplies_by_it(checkpoint: str, dtype: torch.dtype) -> None:
    policy: Any = load_policy(checkpoint, dtype)
    config = policy.config
    told = {
        "hidden_states": torch.randn(1, 256, config.in_channels).to(dtype),
        "timestep": torch.tensor([0.5]).to(dtype),
        "encoder_hidden_states": torch.randn(1, 16, config.joint_attention_dim).to(dtype),
        "encoder_hidden_states_mask": torch.ones(1, 16, dtype=torch.bool),
        "img_shapes": [[(1, 16, 16)]],
    }
    with torch.no_grad():
        eager = policy(**told, return_dict=False)[0].float()
        with compiled_blocks(Setting(policy, "qwen_image", dtype)):
            compiled = policy(**told, return_dict=False)[0].float()
    assert (compiled - eager).norm() < 0.05 * eager.norm()


def test_other_numbers_than_it_computes_with_are_left_to_the_kernel() -> None:
    query, key, _ = random(2, 256, 256, 1, 8)
    assert not by_products(query.double(), key.double(), None) and not by_products(query, key[..., :4], None)
    assert not by_products(query, key, torch.ones(1, 512, dtype=torch.bool)), "a mask for all samples together"


@pytest.mark.parametrize(("queries", "keys"), [(70, 40000), (1300, 1300)])
def test_no_more_scores_are_made_at_a_time_than_are_allowed(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, own = [], attention_products.onednn

    def onednn(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        made = own(rows, *others)
        seen.append(made.numel())
        return made

    monkeypatch.setattr(attention_products, "onednn", onednn)
    query, key, value = random(1, queries, keys, 1, 8)
    attention_by_products(query, key, value, None)
    assert max(seen) <= max(attention_products.TOGETHER, attention_products.FEW * keys) < queries * keys
