"""`omni-rollout plan` for two experts and for video, against the real things: files' sizes, diffusers' models, autograd."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from omni_rollout.cli import main
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.launch.compose import compose
from omni_rollout.models import family_module
from omni_rollout.models.base.policy import Experts
from omni_rollout.models.base.sizes import Pass
from omni_rollout.models.base.velocity import Conditioning, velocity
from omni_rollout.models.wan2_2 import operators, policy, sizes
from omni_rollout.models.wan2_2.activations import saved
from omni_rollout.nano.random_weights import build_random
from omni_rollout.plan.memory import engine_parts, rank_parts
from omni_rollout.plan.split import make_run
from omni_rollout.policy.lora import attach_lora

T2V, I2V = sizes.PUBLISHED


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes_are_those_of_diffusers_and_transformers():
    text = UMT5Config(**sizes.PUBLISHED[T2V]["text_encoder"])
    with torch.device("meta"):
        t2v, i2v, vae = WanTransformer3DModel(), WanTransformer3DModel(in_channels=36, out_channels=16), AutoencoderKLWan()
        encoder = UMT5EncoderModel(text)
    told = sizes.read_sizes(T2V)
    assert told.transformer.parameters == numbers(t2v) == 14_288_491_584 and told.experts == 2
    assert told.transformer.block_parameters == numbers(t2v.blocks[0])
    assert sizes.read_sizes(I2V).transformer.parameters == numbers(i2v)
    assert told.vae_parameters == numbers(vae) and told.text_encoder_parameters == numbers(encoder)


@pytest.mark.parametrize("family", ["wan2_2", "wan2_2_i2v"])
def test_sizes_of_a_folder_are_those_of_its_files(family, tmp_path):
    build_random(tmp_path, family=family)
    told = family_module(family, "sizes").read_sizes(str(tmp_path))
    for name in ("transformer", "transformer_2"):
        loaded: Any = WanTransformer3DModel.from_pretrained(tmp_path, subfolder=name)
        assert told.transformer.parameters == numbers(loaded)
    assert told.text_encoder_parameters == numbers(UMT5EncoderModel.from_pretrained(tmp_path, subfolder="text_encoder"))
    vae: Any = AutoencoderKLWan.from_pretrained(tmp_path, subfolder="vae")
    assert told.vae_parameters == numbers(vae)


def network(layers: int, heads: int, dtype: torch.dtype, rank: int) -> Any:
    torch.manual_seed(0)
    one: Any = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=32, text_dim=96, ffn_dim=80 * heads, num_layers=layers
    )
    operators.install(one, dtype)
    if rank:
        attach_lora(one, rank=rank)
    return one.eval()


def kept_by_autograd(transformer: Any, run: Pass, dtype: torch.dtype) -> int:
    """Bytes of the storages that a forward pass saves for backward, each once; not its parameters and RoPE's tables."""
    side = 16 * math.isqrt(run.image_tokens // 3)
    text = torch.randn(run.text_tokens, 96).to(dtype)
    row = Conditioning(
        prompt_embeds=text,
        prompt_embeds_mask=torch.ones(len(text), dtype=torch.bool),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        spec=family_module("wan2_2", "spec").resolve(
            {"height": side, "width": side, "true_cfg_scale": 1.0, "prompt_width": len(text), "extra": {"frames": 9}}
        ),
    )
    parameters = {tensor.untyped_storage().data_ptr() for tensor in transformer.parameters()}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shape = (run.rows, *family_module("wan2_2", "spec").layout(row.spec).latent)
        latents, times = torch.randn(shape), torch.full((run.rows,), 500.0)
        forward = partial(policy.network, Experts({"transformer": transformer}))
        predicted = velocity(forward, latents, times, [row] * run.rows, dtype)
        sigma = torch.full((run.rows,), 0.5)
        sde_step(predicted, latents, sigma, sigma - 0.1, noise_level=0.7, sde_type="sde", prev_sample=latents + 0.1)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype, rank):
    for layers, heads in ((2, 4), (3, 6)):
        transformer = network(layers, heads, dtype, rank)
        model = sizes.transformer(transformer.config)
        run = Pass(rows=4, image_tokens=3 * 64, text_tokens=48, item=dtype.itemsize)
        for checkpointing in (False, True):
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            measured = kept_by_autograd(transformer, run, dtype)
            derived = saved(model, run, lora=bool(rank), checkpointing=checkpointing)
            tolerance = 0.03 if checkpointing else 0.015
            assert math.isclose(derived, measured, rel_tol=tolerance), (layers, heads, checkpointing, derived / measured)


def run_of(family: str, path: str, *overrides: str) -> Any:
    given = [f"model.family={family}", f"model.path={path}", "model.dtype=bfloat16", "collate.prompt_width=512", *overrides]
    config = compose(given, unused=["prompts"])
    return make_run(config, family_module(family, "sizes").read_sizes(path))


def part(parts: Any, name: str) -> int:
    return next(one.bytes for one in parts if one.name == name)


def test_both_experts_are_counted_and_one_computes_at_a_time():
    run = run_of("wan2_2", T2V, "trainer.lora_rank=0")
    one = 14_288_491_584
    of_rank, of_engine = rank_parts(run, 1), engine_parts(run)
    assert [part(of_rank, name) for name in ("master weights", "gradients", "AdamW's moments")] == [8 * one, 8 * one, 16 * one]
    assert part(of_engine, "transformer") == 2 * 2 * one
    assert run.passes(1)[0].image_tokens == 21 * 30 * 52 and [(p.rows, p.text_tokens) for p in run.passes(1)] == [(2, 512)]
    assert "branch gradients" not in {each.name for each in of_rank}, "both branches go through the weights together"
    two = run_of("wan2_2", T2V, "trainer.lora_rank=0", "collate.negative_prompt_width=256")
    assert [(p.rows, p.text_tokens) for p in two.passes(1)] == [(1, 512), (1, 256)]
    assert part(rank_parts(two, 1), "branch gradients") == 4 * one
    alone = replace(run, sizes=replace(run.sizes, experts=1))
    assert part(rank_parts(alone, 1), "activations") == part(of_rank, "activations")
    lora = run_of("wan2_2", T2V, "trainer.lora_rank=16")
    assert lora.trained == 2 * 40 * 8 * 2 * 16 * 5120
    zero3 = ("trainer.lora_rank=16", "trainer.engine=deepspeed", "trainer.zero_stage=3", "collate.negative_prompt_width=256")
    gathered = part(rank_parts(run_of("wan2_2", T2V, *zero3), 2), "gathered weights")
    assert gathered == 4 * (one + lora.trained // 2), "in two passes, all of the expert that computes"


def test_a_condition_is_counted_and_longer_videos_need_more():
    t2v, i2v = run_of("wan2_2", T2V), run_of("wan2_2_i2v", I2V, "sampling.height=480", "sampling.width=832")
    assert (t2v.conditions, i2v.conditions) == (0, 20 * 21 * 60 * 104)
    assert part(engine_parts(i2v), "requests") - part(engine_parts(t2v), "requests") == 8 * 2 * i2v.conditions
    short = run_of("wan2_2", T2V, "sampling.extra.frames=41")
    for name in ("requests", "working memory"):
        assert part(engine_parts(short), name) < part(engine_parts(t2v), name)


def test_the_command_says_what_does_not_fit(capsys, tmp_path):
    words = ["plan", "gpus=8x80", "model.family=wan2_2", f"model.path={T2V}", "trainer.lora_rank=0", "model.dtype=bfloat16"]
    assert main([*words, "--json", str(tmp_path / "p.json")]) == 1
    assert "28.58 B" in capsys.readouterr().out and not json.loads((tmp_path / "p.json").read_text())["fits"]
