"""The self-check notices what would break exactness, falls back where it can, and refuses by name where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni_rollout.diffusion import machine as machine_module
from omni_rollout.diffusion import products
from omni_rollout.diffusion import self_check as module
from omni_rollout.diffusion.machine import differences, machine, pin_switches, pin_thread
from omni_rollout.diffusion.products import Calls, EqualCalls, PackedWeight, exact_linear, set_calls
from omni_rollout.diffusion.self_check import Layer, find_fused, self_check
from omni_rollout.errors import PinnedKnobError

CPU = torch.device("cpu")
LAYERS = [Layer("blocks.0.to_q", 64, 64), Layer("blocks.0.mlp", 256, 64), Layer("blocks.1.to_q", 64, 64)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    module._checked.clear()
    products.forget_equal_calls()
    pin_switches()
    yield
    module._checked.clear()
    products.forget_equal_calls()
    set_calls(Calls.blocks)
    torch.set_num_threads(threads)
    pin_switches()
    pin_thread(threads)


def check(dtype: torch.dtype = torch.float32, layers: list[Layer] = LAYERS) -> dict[str, Any]:
    return self_check(layers, heads=2, head_dim=32, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_multiplies_in_blocks(dtype):
    found = check(dtype)
    assert found["calls"] == "blocks of 16, 128 rows" and products.calls() is Calls.blocks
    assert found["switches"] == "pinned" and found["threads"] == torch.get_num_threads()
    assert found == check(dtype) and found["kernels"] != check(dtype, LAYERS[:1])["kernels"]


def test_another_kernel_has_another_digest(monkeypatch):
    before = check()
    module._checked.clear()
    call = products._call
    monkeypatch.setattr(
        products, "_call", lambda x, w, b, out, packed=None: call(x.flip(-1), w.flip(-1), b, out)
    )  # another order of the sum
    assert check()["kernels"] != before["kernels"]


def test_bits_that_hang_on_the_position_in_a_call_lead_to_one_sample_a_call(monkeypatch):
    call = products._call
    monkeypatch.setattr(
        products,
        "_call",
        lambda x, w, b, out, packed=None: call(x, w, b, out).mul_(1 + 2.0**-20 * torch.arange(len(x))[:, None]),
    )
    assert check()["calls"] == "samples" and products.calls() is Calls.samples
    assert check()["calls"] == "samples", "remembered"


def test_what_cancels_out_shows_another_order_of_the_sum():
    """At AVX512_CORE and 5 threads one row of a block of bf16 had other bits, and sums as they come did not show it."""
    values = module.Values(torch.bfloat16, CPU)
    plain = values(128, 256), values(1024, 256), values(1024)

    def seen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
        forward = F.linear(x.float(), weight.float(), bias.float())
        order = torch.arange(256).flip(0)
        backward = F.linear(x.float()[:, order], weight.float()[:, order], bias.float())
        return (forward.bfloat16() != backward.bfloat16()).float().mean().item()

    assert seen(*values.cancelling(128, 1024, 256)) > 0.5 > 500 * seen(*plain)


def test_what_attention_leaves_of_values_that_cancel_out_shows_another_order_of_the_tokens():
    joint = module.Values(torch.bfloat16, CPU)(3, 77, 3 * 64) / 64

    def seen(joint: torch.Tensor) -> float:
        query, key, value = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
        other = F.scaled_dot_product_attention(query, key.roll(13, 2), value.roll(13, 2))
        return (other != F.scaled_dot_product_attention(query, key, value)).float().mean().item()

    assert seen(module._cancelling_tokens(joint)) > 5 * seen(joint) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditioning", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_other_sizes_that_were_found_have_the_bits_of_the_blocks(dtype, conditioning, threads):
    torch.set_num_threads(threads)
    layers = [Layer("to_q", 768, 192), Layer("mlp", 192, 768), Layer("wide", 3072, 768)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        weight = torch.randn(layer.out_features, layer.in_features, generator=generator).to(dtype)
        bias = torch.randn(layer.out_features, generator=generator).to(dtype)
        x = torch.randn(1500, layer.in_features, generator=generator).to(dtype)
        cases = [x[:number] if conditioning else x[None, :number] for number in (1, 16, 40, 128, 300, 777, 1500)]
        products.forget_equal_calls()
        in_blocks = [exact_linear(case, weight, bias) for case in cases]
        module._checked.clear()
        pin_thread(threads)
        check(dtype, layers)
        assert products._equal, "looked for"
        for case, expected in zip(cases, in_blocks, strict=True):
            assert torch.equal(exact_linear(case, weight, bias), expected), products._equal
            assert torch.equal(exact_linear(case, weight, bias, None, PackedWeight()), expected), products._equal


@pytest.mark.parametrize("place", [0, 63, 500])
def test_a_size_of_which_one_row_has_other_bits_is_not_taken(place, monkeypatch):
    def found() -> set[int]:
        module._checked.clear()
        check(layers=[Layer("to_q", 64, 64)])
        return {size for key, equal in products._equal.items() for size in equal.rows if not key[4]}  # of tokens

    before, call = found(), products._call
    assert 512 in before, "on every machine seen so far"

    def otherwise(x: torch.Tensor, w: torch.Tensor, b: Any, out: Any, packed: Any = None) -> torch.Tensor:
        made = call(x, w, b, out, packed)
        if len(x) == 512:
            made[place, 5] *= 1 + 2.0**-20
        return made

    monkeypatch.setattr(products, "_call", otherwise)
    assert found() == before - {512}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_that_one_call_computes_has_the_bits_of_its_parts(dtype):
    parts, features = (256, 256, 256), 256
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sum(parts), features, generator=generator).to(dtype)
    bias = torch.randn(sum(parts), generator=generator).to(dtype)
    x = torch.randn(1500, features, generator=generator).to(dtype)
    cases = [x[None, :number] for number in (1, 16, 40, 128, 256, 300, 777, 1500)]
    apart = [exact_linear(case, weight, bias, parts) for case in cases]
    check(dtype, [Layer("to_q", parts[0], features)])
    find_fused(parts, features, dtype=dtype, device=CPU)
    assert products.equal_calls(weight, conditioning=False, parts=parts) is not None, "looked for"
    for case, expected in zip(cases, apart, strict=True):
        assert torch.equal(exact_linear(case, weight, bias, parts), expected)
        assert torch.equal(exact_linear(case, weight, bias, parts, PackedWeight()), expected)


def test_one_call_that_gives_a_part_other_bits_is_not_taken(monkeypatch):
    call = products._call

    def otherwise(x: torch.Tensor, w: torch.Tensor, b: Any, out: Any, packed: Any = None) -> torch.Tensor:
        made = call(x, w, b, out, packed)
        if len(w) == 192 and len(x) != 128:
            made[0, 191] *= 1 + 2.0**-20
        return made

    monkeypatch.setattr(products, "_call", otherwise)
    check()
    find_fused((64, 64, 64), 64, dtype=torch.float32, device=CPU)
    found = products.equal_calls(torch.zeros(192, 64), conditioning=False, parts=(64, 64, 64))
    assert found is not None and found.rows in ((128,), ())


def test_blocks_that_are_not_among_the_equal_calls_are_not_exact(monkeypatch):
    found = module._equal_calls
    monkeypatch.setattr(
        module, "_equal_calls", lambda *given: EqualCalls(tuple(rows for rows in found(*given).rows if rows != 128))
    )
    assert check()["calls"] == "samples" and products.calls() is Calls.samples


@pytest.mark.parametrize("place", [None, 0, 500])
def test_packed_weights_are_taken_where_no_row_has_other_bits(place, monkeypatch):
    call = products._call

    def pretended(x: torch.Tensor, w: torch.Tensor, b: Any, out: Any, packed: Any = None) -> torch.Tensor:
        made = call(x, w, b, out)
        if packed is not None and place is not None and len(x) > place:
            made[place, 5] *= 1 + 2.0**-20
        return made

    monkeypatch.setattr(products, "_call", pretended)
    monkeypatch.setattr(module, "may_be_packed", lambda weight: True)
    monkeypatch.setattr(module, "packed", lambda weight: weight)
    check(layers=[Layer("to_q", 64, 64)])
    of_tokens = {equal.packed for key, equal in products._equal.items() if not key[4]}
    assert of_tokens == {place is None}


def test_a_packed_weight_is_kept_until_it_is_to_be_forgotten(monkeypatch):
    made: list[torch.Tensor] = []
    monkeypatch.setattr(products, "packed", lambda weight: made.append(weight) or weight)
    kept, weight = PackedWeight(), torch.zeros(64, 64)
    assert kept.of(weight) is kept.of(weight) and len(made) == 1
    kept.forget()
    assert kept.of(weight) is weight and len(made) == 2
    assert not any(
        products.may_be_packed(torch.empty(shape, dtype=dtype, device=device))
        for shape, dtype, device in [
            ((4096, 2048), torch.bfloat16, "cpu"),  # packing it takes too long
            ((64, 64), torch.float64, "cpu"),
            ((64, 64), torch.bfloat16, "meta"),
        ]
    )
    for by_onednn in (True, False):
        monkeypatch.setattr(products, "float32_by_onednn", lambda by_onednn=by_onednn: by_onednn)
        assert products.may_be_packed(torch.empty(64, 64)) is by_onednn, "MKL keeps no layout of its own"


def test_what_no_call_makes_exact_is_refused_by_the_layers_name(monkeypatch):
    call, count = products._call, iter(range(10**9))
    monkeypatch.setattr(products, "_call", lambda x, w, b, out, packed=None: call(x, w, b, out).add_(next(count) % 7))
    with pytest.raises(PinnedKnobError, match=r"blocks.1.to_q \(64 -> 64, torch.float32\).*choose parity=fast"):
        check()


def test_attention_that_sees_the_batch_is_refused_by_name(monkeypatch):
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **kw: plain(q, *rest, **kw) * (1 + len(q) * 2.0**-20)
    )
    with pytest.raises(PinnedKnobError, match="attention gives a sample other bits in other company"):
        check()


def test_an_activation_with_a_tail_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(module, "exact_gelu", lambda x: x + (x.numel() % 4))
    with pytest.raises(PinnedKnobError, match="gelu gives a sample other bits"):
        check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: torch.set_float32_matmul_precision("medium"), "float32_matmul_precision=medium"),
        (lambda: setattr(torch.backends.mkldnn, "enabled", False), "mkldnn.enabled=False"),
        (lambda: torch.set_flush_denormal(True), "flush_denormal=True"),
    ],
)
def test_a_switch_that_changes_bits_is_named(change, named):
    before = check()
    change()
    after = check()
    assert after["switches"] == named
    assert any(named in line for line in differences(after, before))


def test_two_machines_of_equal_kernels_may_work_together():
    here = check()
    assert differences(here, here) == []
    there = {**here, "device": "another CPU", "instruction_set": "torch AVX2, oneDNN AVX2"}
    assert differences(there, here) == []
    assert differences({**there, "kernels": "other"}, here) == [
        f"device ('another CPU', here {here['device']!r})",
        f"instruction_set ('torch AVX2, oneDNN AVX2', here {here['instruction_set']!r})",
    ]
    assert differences({**here, "kernels": "other"}, here) == ["kernels (the self-check's results have other bits)"]


@pytest.mark.parametrize("field", ["threads", "calls", "torch", "switches"])
def test_what_must_agree_is_refused_even_with_equal_kernels(field):
    here = check()
    (line,) = differences({**here, field: "other"}, here)
    assert line.startswith(f"{field} ('other', here")


def test_a_record_without_a_machine_differs():
    assert differences({}, check())


@pytest.mark.parametrize(("cap", "most"), [("AVX2", "AVX2"), ("AVX512_CORE", "AVX512_CORE"), ("AVX2_VNNI", "AVX2")])
def test_the_instruction_set_that_an_environment_leaves_is_told(monkeypatch, cap, most):
    names = [name for name, _ in machine_module._ISAS]
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    free = machine_module.onednn_isa()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert machine_module.onednn_isa() == min(free, most, key=names.index)


def test_a_machine_is_told_in_json_types_alone():
    told = machine(torch.device("cpu"))
    assert json.loads(json.dumps(told)) == told
    assert type(told["torch"]) is str, "torch's own type cuts both sides into numbers whenever it is compared"


def test_threads_hold_for_the_calling_thread():
    code = """
import threading, torch
from omni_rollout.diffusion.machine import machine, pin_thread
torch.set_num_threads(2)
torch.ones(100_000).exp()
seen = []
def other():
    torch.set_num_threads(1)
    torch.ones(100_000).exp()
    seen.append(machine(torch.device("cpu"))["threads"])
    pin_thread(2)
    seen.append(machine(torch.device("cpu"))["threads"])
thread = threading.Thread(target=other); thread.start(); thread.join()
print(seen, machine(torch.device("cpu"))["threads"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[0] == "[1, 2] 2"
    assert machine(CPU)["threads"] == torch.get_num_threads()
