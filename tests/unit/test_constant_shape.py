"""A row's bits depend on the row alone: products, activations, norms, attention, guidance, the step and its log-prob."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from omni_rollout.diffusion import exact_ops, machine, products
from omni_rollout.diffusion import self_check as self_checks
from omni_rollout.diffusion.activations import exact_gelu, exact_silu
from omni_rollout.diffusion.exact_ops import exact_rope
from omni_rollout.diffusion.guidance import guide
from omni_rollout.diffusion.products import Calls, block_rows, exact_linear, set_calls
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.diffusion.self_check import Layer, self_check
from omni_rollout.models.wan2_2 import operators as wan

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((64, 64), (256, 1024), (1024, 256), (512, 512), (768, 3072))  # (K, N)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    products.forget_equal_calls()  # of models that other tests have loaded
    yield
    torch.set_num_threads(threads)
    set_calls(Calls.blocks)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def found(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> str:
    """What the self-check says of this layer: at AVX512_CORE oneDNN shares bf16 rows out among 3 or 5 threads unevenly."""
    layers, cpu = [Layer("layer", shape[1], shape[0])], torch.device("cpu")
    return self_check(layers, heads=1, head_dim=16, dtype=dtype, device=cpu)["calls"]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.sampled_from([1, 15, 16, 17, 29, 64, 100, 128, 200, 300]), min_size=1, max_size=5),
    threads=st.sampled_from([1, 2, 3, 5, 7]),
    seed=st.integers(0, 5),
)
@example(shape=(256, 1024), dtype=torch.bfloat16, lengths=[1, 1, 1, 64], threads=5, seed=0)  # other bits at AVX512_CORE
def test_a_row_of_tokens_has_the_same_bits_in_any_company(shape, dtype, lengths, threads, seed):
    torch.set_num_threads(threads)
    calls = found(shape, dtype, threads)
    assume(calls.startswith("blocks"))
    set_calls(Calls.blocks)
    inputs, outputs = shape
    weight, bias = normal(outputs, inputs, seed=seed, dtype=dtype), normal(outputs, seed=seed + 1, dtype=dtype)
    portions = [normal(1, length, inputs, seed=seed + length, dtype=dtype) for length in lengths]
    together = exact_linear(torch.cat(portions, dim=1), weight, bias).split(lengths, dim=1)
    for portion, expected in zip(portions, together, strict=True):
        assert torch.equal(exact_linear(portion, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_conditioning_row_has_the_same_bits_in_a_batch_of_1_to_40(shape, dtype):
    weight, x = normal(shape[1], shape[0], dtype=dtype), normal(40, shape[0], seed=1, dtype=dtype)
    together = exact_linear(x, weight, None)
    for rows in (1, 2, 3, 8, 15, 16, 17, 33):
        assert torch.equal(exact_linear(x[:rows], weight, None), together[:rows])
        assert torch.equal(exact_linear(x[-rows:], weight, None), together[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strided_input_is_multiplied_like_its_copy(dtype):
    x, weight = normal(3, 80, 256, dtype=dtype), normal(256, 256, dtype=dtype)
    assert torch.equal(exact_linear(x[:, 7:50], weight, None), exact_linear(x[:, 7:50].clone(), weight, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_projection_is_its_parts(dtype):
    weights = [normal(256, 128, seed=seed, dtype=dtype) for seed in range(3)]
    biases = [normal(256, seed=seed, dtype=dtype) for seed in range(3)]
    x = normal(2, 45, 128, seed=9, dtype=dtype)
    fused = exact_linear(x, torch.cat(weights), torch.cat(biases), parts=[256] * 3)
    for part, weight, bias in zip(fused.chunk(3, dim=-1), weights, biases, strict=True):
        assert torch.equal(part, exact_linear(x, weight, bias))


@pytest.mark.parametrize("calls", list(Calls))
@pytest.mark.parametrize("rows", [(300,), (2, 77)])
def test_gradients_are_those_of_one_linear(calls, rows):
    set_calls(calls)
    x, weight, bias = (normal(*shape).double().requires_grad_() for shape in ((*rows, 24), (40, 24), (40,)))
    ours = torch.autograd.grad(exact_linear(x, weight, bias).pow(2).sum(), (x, weight, bias))
    plain = torch.autograd.grad(F.linear(x, weight, bias).pow(2).sum(), (x, weight, bias))
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected)
    assert torch.autograd.gradcheck(lambda x: exact_linear(x[:3], weight.detach(), None), (x.detach()[:3].requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_one_call_computes_goes_torchs_own_way_back_with_the_same_bits(dtype, bias):
    """Forward and gradients of `_call` and of `_Product` are the same calls."""
    rows = products.NARROW_ROWS
    results = []
    for function in (
        lambda x, w, b: exact_linear(x, w, b),
        lambda x, w, b: products._Product.apply(x, w, b, [(0, rows, rows)]),
    ):
        x, weight = (normal(rows, 64, dtype=dtype).requires_grad_(), normal(96, 64, seed=1, dtype=dtype).requires_grad_())
        shift = normal(96, seed=2, dtype=dtype).requires_grad_() if bias else None
        out = function(x[None] if not results else x, weight, shift).reshape(rows, 96)
        assert (type(out.grad_fn.next_functions[0][0]).__name__ == "_ProductBackward") == bool(results)
        out.backward(normal(rows, 96, seed=3, dtype=dtype))
        results.append([out, x.grad, weight.grad, *([] if shift is None else [shift.grad])])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.lists(st.integers(1, 300), min_size=1, max_size=1), st.lists(st.integers(1, 40), min_size=2, max_size=2)),
    features=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    bias=st.booleans(),
    expanded=st.booleans(),
    by_onednn=st.booleans(),
)
def test_products_in_float32_are_those_of_float64_by_either_library(rows, features, bias, expanded, by_onednn):
    """Forward and gradients, with a gradient that is one number laid out as many, too."""
    k, n = features
    tensors = [normal(*rows, k), normal(n, k, seed=1), normal(n, seed=2) if bias else None]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "float32_by_onednn", lambda: by_onednn)
        for kind in (torch.float32, torch.float64):
            x, weight, shift = (None if one is None else one.detach().clone().to(kind).requires_grad_() for one in tensors)
            out = exact_linear(x, weight, shift) if kind is torch.float32 else F.linear(x, weight, shift)
            assert out.requires_grad and out.shape == (*rows, n)
            out.sum().backward() if expanded else out.backward(normal(*rows, n, seed=3).to(kind))
            found.append([out, x.grad, weight.grad, *([] if shift is None else [shift.grad])])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("by_onednn", [True, False])
def test_a_bias_that_lies_apart_no_rows_and_second_derivatives(by_onednn, monkeypatch):
    """oneDNN would read what lies beside such a bias, multiply no nothing, and give second derivatives of zero."""
    monkeypatch.setattr(products, "float32_by_onednn", lambda: by_onednn)
    weight, apart = normal(4, 40).requires_grad_(), torch.arange(8.0)[::2]
    for bias in (apart, torch.full((1,), 7.0).expand(4)):
        assert torch.equal(exact_linear(torch.zeros(1, 128, 40), weight, bias)[0, 0], bias)
    for shape in ((0, 40), (3, 0, 40)):
        exact_linear(torch.empty(shape).requires_grad_(), weight, apart).sum().backward()
    x = normal(5, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(exact_linear(x, weight, apart).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_in_float32_has_the_same_bits_in_any_company_by_either_library(shape, by_onednn, monkeypatch):
    """Both are tried on any CPU; `float32_by_onednn` takes one of them."""
    monkeypatch.setattr(products, "float32_by_onednn", lambda: by_onednn)
    monkeypatch.setattr(self_checks, "_checked", {})
    torch.set_num_threads(2)
    found.__wrapped__(shape, torch.float32, 2)
    x, weight, bias = normal(5, 77, shape[0]), normal(shape[1], shape[0], seed=1), normal(shape[1], seed=2)
    together = exact_linear(x, weight, bias)
    assert torch.equal(exact_linear(x.flip(0), weight, bias), together.flip(0))
    for sample, expected in zip(x, together, strict=True):
        assert torch.equal(exact_linear(sample[None], weight, bias)[0], expected)
    wanting = exact_linear(x, weight.requires_grad_(), bias)
    assert torch.equal(wanting, together), "the trainer's, which wants gradients"


@pytest.mark.parametrize(
    ("vendor", "mkl", "expected"),
    [("AuthenticAMD", True, True), ("GenuineIntel", True, False), ("AuthenticAMD", False, False), ("", True, False)],
)
def test_float32_is_asked_of_onednn_where_mkl_is_slow(vendor, mkl, expected, monkeypatch):
    monkeypatch.setattr(machine, "_of_the_cpu", lambda field: {"vendor_id": vendor}[field])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert machine.float32_by_onednn.__wrapped__() is expected


def test_every_call_of_a_layer_has_the_shape_that_the_layer_decides(monkeypatch):
    seen: set[tuple[int, ...]] = set()
    call = products._call
    monkeypatch.setattr(products, "_call", lambda x, *rest: (seen.add(tuple(x.shape)), call(x, *rest))[1])
    weight = normal(96, 64)
    for shape in ((1, 1, 64), (1, 128, 64), (7, 33, 64), (64,), (16, 64), (40, 64)):
        exact_linear(normal(*shape).view(-1, 64) if len(shape) < 3 else normal(*shape), weight, None)
    assert seen == {(products.NARROW_ROWS, 64), (products.CONDITIONING_ROWS, 64)}
    assert block_rows(3072, 3072, conditioning=False, device="cpu") == products.WIDE_ROWS
    assert block_rows(3072, 3072, conditioning=True, device="cpu") == products.CONDITIONING_ROWS


@given(
    number=st.integers(0, 5000),
    sizes=st.sets(st.sampled_from([16, 32, 64, 128, 256, 512, 1024]), min_size=1).map(lambda sizes: tuple(sorted(sizes))),
)
@settings(deadline=None, max_examples=200)
def test_cuts_hold_every_row_once_in_calls_of_the_given_sizes(number, sizes):
    cuts = products._cuts(number, sizes)
    assert [start for start, _, _ in cuts] == [0, *(stop for _, stop, _ in cuts)][: len(cuts)]
    assert (cuts[-1][1] if cuts else 0) == number and all(0 < stop - start <= call for start, stop, call in cuts)
    assert all(call in sizes for _, _, call in cuts)
    assert all(stop - start == call for start, stop, call in cuts[:-1]), "the last one alone is padded"
    padded = sum(call for _, _, call in cuts)
    assert padded < number + sizes[0] or padded <= products.PADDED * number


def test_few_calls_with_little_padding():
    sizes = (16, 128, 256, 1024)
    assert [call for _, _, call in products._cuts(128, sizes)] == [128]
    assert [call for _, _, call in products._cuts(210, sizes)] == [256], "nearly full"
    assert [call for _, _, call in products._cuts(1300, sizes)] == [1024, 256, 16, 16]
    assert [call for _, _, call in products._cuts(300, (256,))] == [256, 256]


def test_one_sample_a_call_needs_no_equal_positions(monkeypatch):
    """A device whose kernels give a row other bits at another place of a call."""
    call = products._call

    def by_position(x: torch.Tensor, weight: torch.Tensor, bias: Any, out: Any, packed: Any = None) -> torch.Tensor:
        return call(x, weight, bias, out).add_(torch.arange(len(x))[:, None] / 64)

    monkeypatch.setattr(products, "_call", by_position)
    weight, x = normal(48, 64), normal(4, 77, 64)
    assert not torch.equal(exact_linear(x, weight, None)[2:], exact_linear(x[2:], weight, None))
    set_calls(Calls.samples)
    assert torch.equal(exact_linear(x, weight, None)[2:], exact_linear(x[2:], weight, None))
    assert torch.equal(exact_linear(x[:, 0], weight, None)[3:], exact_linear(x[3:, 0], weight, None))


@settings(max_examples=60, deadline=None)
@given(
    operator=st.sampled_from([exact_silu, exact_gelu]),
    dtype=st.sampled_from(DTYPES),
    length=st.one_of(st.integers(1, 300), st.integers(16_000, 200_000)),
    start=st.integers(0, 40),
    threads=st.sampled_from([1, 2, 3, 5, 7, 16]),
)
def test_an_activation_sees_neither_length_nor_threads(operator, dtype, length, start, threads):
    x = normal(250_003, dtype=dtype) * 4
    torch.set_num_threads(1)
    expected = operator(x)[start : start + length]
    torch.set_num_threads(threads)
    assert torch.equal(operator(x[start : start + length]), expected)


def test_torchs_own_gelu_does_see_them():
    """What the test above protects against; where it passes, the module could go."""
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        pytest.skip("measured on AVX2 and AVX512 alone")
    x = normal(250_003) * 4
    whole = F.gelu(x, approximate="tanh")
    assert any(not torch.equal(F.gelu(x[:n], approximate="tanh"), whole[:n]) for n in range(1, 1000, 7))


@pytest.mark.parametrize(("operator", "plain"), [(exact_silu, F.silu), (exact_gelu, lambda x: F.gelu(x, approximate="tanh"))])
def test_an_activation_is_torchs_with_its_gradient(operator, plain):
    x = (normal(3, 33_001).double() * 3).requires_grad_()
    torch.testing.assert_close(operator(x), plain(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (operator, plain)))


def attention(masked: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def attend(x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (3, 32)).transpose(1, 2) for part in x.chunk(3, dim=-1))
        mask = (torch.arange(x.shape[1]) % 5 != 2)[None, None, None].expand(len(x), -1, -1, -1) if masked else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    return attend


def modulate(x: torch.Tensor) -> torch.Tensor:
    scale, shift = x[:, :1].tanh(), x[:, 1:2]
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype) * (1 + scale) + shift


def rope(x: torch.Tensor) -> torch.Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).float(), torch.linspace(0.01, 1, 16))
    return exact_rope(x.unflatten(-1, (-1, 32)), torch.polar(torch.ones_like(angles), angles))


def guidance(x: torch.Tensor) -> torch.Tensor:
    return guide(x, x.flip(-1), torch.full((len(x),), 4.0))


def scored_step(x: torch.Tensor) -> torch.Tensor:
    sample, sigmas = x.float(), torch.linspace(0.9, 0.6, 16)[: len(x)] * 0 + 0.8
    prev = sample * 0.97
    return sde_step(sample.flip(1), sample, sigmas, sigmas - 0.1, noise_level=0.7, sde_type="sde", prev_sample=prev).log_prob


def wan_norm(x: torch.Tensor) -> torch.Tensor:
    norm = wan.ExactRMSNorm(x.shape[-1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.8, 1.2, x.shape[-1]))
    return norm(x)


def wan_rope(x: torch.Tensor) -> torch.Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).float(), torch.linspace(0.01, 1, 16))[None, :, None]
    return wan.rotate(x.unflatten(-1, (-1, 32)), angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def wan_cross_attention(x: torch.Tensor) -> torch.Tensor:
    query, text, value = (part.unflatten(-1, (3, 32)) for part in x.chunk(3, dim=-1))
    return wan._attend(query, text[:, :40], value[:, :40], None)


def wan_patches(x: torch.Tensor) -> torch.Tensor:
    """Tokens as the pixels of two frames, with the other channels left out."""
    layer = torch.nn.Conv3d(4, 40, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    layer.weight.data, layer.bias.data = normal(40, 4, 1, 2, 2, seed=3), normal(40, seed=4)
    layer.__class__ = wan.ExactPatchEmbedding
    layer.compute_dtype = x.dtype
    video = x[:, : x.shape[1] // 4 * 4, :8].reshape(len(x), 4, 2, 2, -1)
    return layer(video[..., : video.shape[-1] // 2 * 2])


def wan_time(x: torch.Tensor) -> torch.Tensor:
    sinusoid = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
    return sinusoid(x[:, 0, 0].float() * 300 + 500)


OPERATORS = {
    "attention": attention(masked=False),
    "masked attention": attention(masked=True),
    "layer norm and modulation": modulate,
    "rms norm": lambda x: F.rms_norm(x.unflatten(-1, (3, -1)), (x.shape[-1] // 3,)),
    "rope": rope,
    "guidance": guidance,
    "step and log-prob": scored_step,
    "Wan's rms norm": wan_norm,
    "Wan's rope": wan_rope,
    "Wan's attention to text": wan_cross_attention,
    "Wan's patches": wan_patches,
    "Wan's sinusoid of time": wan_time,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(16, 16), (5, 77), (8, 256), (3, 1104), (2, 4096)])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_other_operator_of_the_forward_sees_a_samples_company(name, batch, tokens, dtype):
    x = normal(batch, tokens, 288, dtype=dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together = OPERATORS[name](x)
        for row in {0, batch // 2, batch - 1}:
            assert torch.equal(OPERATORS[name](x[row : row + 1])[0], together[row])
        assert torch.equal(OPERATORS[name](x.flip(0)).flip(0), together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 4, 48), (4, 128, 4, 64)], ids=["in halves", "in whole tensors"])
def test_a_rotation_and_its_way_back_are_the_plain_formulas(dtype, shape):
    x, angles = normal(*shape, dtype=dtype).requires_grad_(), normal(shape[1], shape[3] // 2, seed=1)
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    plain = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    freqs = torch.complex(angles.cos(), angles.sin())
    gradient = normal(*shape, seed=2, dtype=dtype)
    rotated = exact_rope(x, freqs)
    assert torch.equal(rotated, plain)
    assert torch.equal(*(torch.autograd.grad(made, x, gradient)[0] for made in (rotated, plain)))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("shape", [(7, 613, 3, 32), (3, 1021, 3, 64), (8, 16, 4, 48), (40, 51, 4, 48), (9, 613, 4, 40)])
def test_no_share_of_a_rotation_ends_within_a_vector(threads, shape, monkeypatch):
    """torch multiplies the rest of a share by other code, which may round once where vectors round twice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, angles = normal(*shape), normal(shape[1], shape[3] // 2, seed=1)
        freqs = torch.complex(angles.cos(), angles.sin())
        rotated = exact_rope(x, freqs)
        monkeypatch.setattr(exact_ops, "_of_whole_vectors", lambda length, row: False)
        assert torch.equal(rotated, exact_rope(x, freqs))
    finally:
        torch.set_num_threads(before)
