"""When one thread computes what all are to give: only with their bits, and only where it is faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from omni_rollout.diffusion import one_thread, products, self_check
from omni_rollout.diffusion.machine import on_one_thread, threads_of_bits
from omni_rollout.diffusion.one_thread import TRIES, FasterThreads, one_thread_suffices
from omni_rollout.diffusion.products import PackedWeight, exact_linear
from omni_rollout.diffusion.self_check import Layer

CPU = torch.device("cpu")
SIZES = {"heads": 4, "head_dim": 48, "dtype": torch.float32, "device": CPU}
NANO = [Layer("to_q", 192, 192), Layer("mlp.up", 768, 192), Layer("mlp.down", 192, 768), Layer("mod", 1152, 192)]
FUSED = [((192, 192, 192), 192)]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    self_check._checked.clear()
    products.forget_equal_calls()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    self_check._checked.clear()
    products.forget_equal_calls()


def suffices(layers: list[Layer] = NANO, **changed: Any) -> bool:
    sizes: dict[str, Any] = {**SIZES, **changed}
    self_check.self_check(layers, **sizes)
    for parts, features in FUSED:
        self_check.find_fused(parts, features, dtype=sizes["dtype"], device=CPU)
    return one_thread_suffices(layers, FUSED, **sizes)


def test_inside_the_bits_are_those_of_all_threads_and_outside_nothing_has_changed() -> None:
    assert (torch.get_num_threads(), threads_of_bits()) == (2, 2)
    with pytest.raises(ZeroDivisionError), on_one_thread():
        assert (torch.get_num_threads(), threads_of_bits()) == (1, 2)
        raise ZeroDivisionError
    assert (torch.get_num_threads(), threads_of_bits()) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 13, 77, 256, 777])
def test_where_it_suffices_products_have_the_bits_of_all_threads(dtype: torch.dtype, rows: int) -> None:
    if not suffices(dtype=dtype):
        pytest.skip("on this machine the products of small layers round by the number of threads")
    generator = torch.Generator().manual_seed(rows)
    for layer in NANO:
        weight, x, bias = (
            torch.randn(*shape, generator=generator).to(dtype)
            for shape in ((layer.out_features, layer.in_features), (1, rows, layer.in_features), (layer.out_features,))
        )
        for given in (x, x[0]):
            expected = exact_linear(given, weight, bias)
            with on_one_thread():
                assert torch.equal(exact_linear(given, weight, bias), expected)
                assert torch.equal(exact_linear(given, weight, bias, kept=PackedWeight()), expected)


@pytest.mark.parametrize("broken", ["a product", "a fused product is only slower", "an operator", "a wide layer", "one thread"])
def test_other_bits_are_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, operators, layers = products._call, self_check.operators, NANO

    def otherwise(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        made = call(x, weight, *rest)
        width = 576 if broken == "a fused product is only slower" else 768
        if torch.get_num_threads() == 1 and len(weight) == width:
            made[0, -1] += 2.0**-20
        return made

    def of_threads(*given: Any) -> Iterator[Any]:
        yield from operators(*given)
        yield "by threads", lambda x: x + 2.0**-20 * torch.get_num_threads(), torch.ones(1)

    if "product" in broken:
        monkeypatch.setattr(products, "_call", otherwise)
    elif broken == "an operator":
        monkeypatch.setattr(one_thread, "operators", of_threads)
    elif broken == "a wide layer":
        layers = [*NANO, Layer("wide", 1024, 1024)]
    else:
        torch.set_num_threads(1)
    assert suffices(layers) == (broken == "a fused product is only slower")
    if broken == "a fused product is only slower":
        with on_one_thread():
            found = products.equal_calls(torch.zeros(576, 192), conditioning=False, parts=FUSED[0][0])
        assert found is not None and found.rows == ()  # each part by itself


def test_a_check_at_one_thread_is_not_taken_for_that_of_an_engine_with_one() -> None:
    suffices()
    weight = torch.zeros(192, 192)
    torch.set_num_threads(1)
    assert products.equal_calls(weight, conditioning=False) is None


@pytest.mark.parametrize("faster", [1, 2])
def test_passes_of_a_shape_are_tried_in_turns_and_then_the_faster_number_is_taken(
    faster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(one_thread.time, "perf_counter", lambda: now)
    passes = FasterThreads()

    def took(shape: str, seconds: dict[int, float]) -> int:
        nonlocal now
        with passes.taken(shape):
            now += seconds[torch.get_num_threads()]
            return torch.get_num_threads()

    seconds = {faster: 1.0, 3 - faster: 2.0}
    assert [took("a", seconds) for _ in range(9)] == [2] * 9, "until it is known"
    passes.suffices = True
    first = {1: 0.0, 2: 0.0}  # is not counted, however fast
    assert [took("a", first if counted < 2 else seconds) for counted in range(2 * TRIES)] == [2, 1] * TRIES
    assert [took("a", seconds) for _ in range(5)] == [faster] * 5
    assert [took("b", {1: 1.0, 2: 1.0}) for _ in range(3)] == [2, 1, 2], "each shape by itself"
    with pytest.raises(ZeroDivisionError), passes.taken("a"):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
