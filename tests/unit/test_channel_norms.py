"""Norms over channels by whole planes have the bits of the VAEs' own: images do not move by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm_omni.diffusion.models.qwen_image import autoencoder_kl_qwenimage as of_vllm_omni

from omni_rollout.models import family_module
from omni_rollout.models.base import channel_norms
from omni_rollout.models.base.channel_norms import ByPlanes, channel_lengths, install_channel_norms

SIZES: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
LATENTS: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
VAES = {"Qwen-Image": AutoencoderKLQwenImage, "Layered": of_vllm_omni.AutoencoderKLQwenImage, "Wan": AutoencoderKLWan}
SIDES = st.tuples(st.integers(1, 3), st.integers(1, 33), st.integers(1, 33))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    family_module("wan2_2", "rollout")  # vllm-omni puts its own norm into diffusers' VAE as it is imported
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@given(st.integers(1, 4), st.integers(1, 130), SIDES, st.integers(0, 99))
@settings(deadline=None)
def test_lengths_are_torchs_own(batch: int, channels: int, size: tuple[int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *size, generator=generator) * torch.randn(1, generator=generator).exp()
    for laid in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
        assert torch.equal(channel_lengths(laid), torch.linalg.vector_norm(laid, dim=1, keepdim=True))


def pair(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """As the engine has it without our norms, and with them."""
    torch.manual_seed(0)
    stock = VAES[kind](**SIZES, **LATENTS).to(dtype)
    for name, parameter in stock.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, 1.0, 0.2)
    ours = copy.deepcopy(stock)
    install_channel_norms(ours)
    assert sum(isinstance(layer, ByPlanes) for layer in ours.modules()) > 10
    return stock, ours


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", VAES)
def test_a_vae_decodes_and_encodes_as_before(kind: str, dtype: torch.dtype, threads: int) -> None:
    stock, ours = pair(kind, dtype)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for frames, rows, columns, batch in ((1, 8, 8, 1), (1, 8, 6, 4), (1, 2, 2, 1), (1, 32, 32, 1), (2, 4, 6, 2)):
            latents = torch.randn(batch, 4, frames, rows, columns).to(dtype)
            video = stock.decode(latents, return_dict=False)[0]
            assert torch.equal(ours.decode(latents, return_dict=False)[0], video), (frames, rows, columns, batch)
            assert torch.equal(ours.encode(video).latent_dist.mode(), stock.encode(video).latent_dist.mode())


INF, NAN = float("inf"), float("nan")
STRANGE = [[0.0, -0.0], [-1e-30, 3.0], [1e25, -1e25], [INF, 1.0], [NAN, -2.0], [1e-40, -1e-41]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", VAES)
def test_strange_numbers_and_layouts_come_out_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Signs of zeros included; and what is put in is left as it was."""
    stock, ours = (
        next(m for m in vae.modules() if type(m).__name__.startswith(channel_norms.NORMS)) for vae in pair(kind, dtype)
    )
    channels = len(stock.gamma)
    x = torch.tensor(STRANGE).to(dtype).repeat(1, channels // 2)[..., None, None, None].repeat(1, 1, 1, 40, 40)
    for given_ in (x, x[:, :, :, :4, :4].contiguous(), x[:1], x.to(memory_format=torch.channels_last_3d), x[:0]):
        before = given_.clone()
        with torch.inference_mode():
            expected, found = stock(given_), ours(given_)
        assert found.dtype == expected.dtype and torch.equal(given_.nan_to_num(), before.nan_to_num())
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(found.signbit() & (found == 0), expected.signbit() & (expected == 0))


@pytest.mark.parametrize("kind", VAES)
def test_gradients_are_those_of_the_stock_norm(kind: str) -> None:
    found = []
    for one in pair(kind, torch.float32):
        latents = torch.ones(1, 4, 1, 8, 8, requires_grad=True)
        one.decode(latents, return_dict=False)[0].square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)


def test_planes_added_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_sum(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1, keepdim=True).sqrt()

    stock, ours = pair("Qwen-Image", torch.float32)
    monkeypatch.setattr(channel_norms, "channel_lengths", by_sum)
    latents = torch.randn(1, 4, 1, 32, 32)
    with torch.inference_mode():
        assert not torch.equal(ours.decode(latents, return_dict=False)[0], stock.decode(latents, return_dict=False)[0])
