"""Norms over channels by whole planes have the bits of diffusers' own: images do not move by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from omni_rollout.models.base import channel_norms
from omni_rollout.models.base.channel_norms import BY_PLANES, channel_lengths, install_channel_norms

SIZES: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
LATENTS: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@given(
    st.integers(1, 4),
    st.integers(1, 130),
    st.tuples(st.integers(1, 3), st.integers(1, 33), st.integers(1, 33)),
    st.integers(0, 99),
)
def test_lengths_are_torchs_own(batch: int, channels: int, size: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=generator) * torch.randn(1, generator=generator).exp()
    for laid in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
        assert torch.equal(channel_lengths(laid), torch.linalg.vector_norm(laid, dim=1, keepdim=True))


def vae(kind: type[Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    made = kind(**SIZES, **LATENTS).to(dtype)
    for name, parameter in made.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, 1.0, 0.2)
    return made


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AutoencoderKLQwenImage, AutoencoderKLWan])
def test_a_vae_decodes_and_encodes_as_before(kind: type[Any], dtype: torch.dtype, threads: int) -> None:
    stock = vae(kind, dtype)
    ours = copy.deepcopy(stock)
    install_channel_norms(ours)
    assert any(type(layer) in BY_PLANES.values() for layer in ours.modules())
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for frames, rows, columns, batch in ((1, 8, 8, 1), (1, 8, 6, 4), (1, 2, 2, 1), (1, 32, 32, 1), (2, 4, 6, 2)):
            latents = torch.randn(batch, 4, frames, rows, columns).to(dtype)
            video = stock.decode(latents, return_dict=False)[0]
            assert torch.equal(ours.decode(latents, return_dict=False)[0], video), (frames, rows, columns, batch)
            assert torch.equal(ours.encode(video).latent_dist.mode(), stock.encode(video).latent_dist.mode())


def test_gradients_are_those_of_the_stock_norm() -> None:
    stock = vae(AutoencoderKLQwenImage, torch.float32)
    ours = copy.deepcopy(stock)
    install_channel_norms(ours)
    found = []
    for one in (stock, ours):
        latents = torch.ones(1, 4, 1, 4, 4, requires_grad=True)
        one.decode(latents, return_dict=False)[0].square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)


def test_planes_added_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_sum(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1, keepdim=True).sqrt()

    stock = vae(AutoencoderKLQwenImage, torch.float32)
    ours = copy.deepcopy(stock)
    install_channel_norms(ours)
    monkeypatch.setattr(channel_norms, "channel_lengths", by_sum)
    latents = torch.randn(1, 4, 1, 32, 32)
    with torch.inference_mode():
        assert not torch.equal(ours.decode(latents, return_dict=False)[0], stock.decode(latents, return_dict=False)[0])
