"""`omni-rollout plan` against the real things: files' sizes, diffusers' own models, what autograd keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from omni_rollout.cli import main
from omni_rollout.config import TrainConfig, TrainerEngineName
from omni_rollout.diffusion import exact_ops, products
from omni_rollout.diffusion.sde import sde_step
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.paths import recipe_dir
from omni_rollout.models.base.velocity import Conditioning, velocity
from omni_rollout.models.qwen_image import policy, sizes
from omni_rollout.models.qwen_image.activations import CONDITIONING_ROWS, Pass, saved
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.nano.components import make_transformer
from omni_rollout.plan.closest import closest
from omni_rollout.plan.parts import When, total
from omni_rollout.plan.split import Gpus, Plan, make_plan, make_run
from omni_rollout.policy.lora import attach_lora
from omni_rollout.rewards.base import sizes as rewards

PUBLISHED = sizes.read_sizes("Qwen/Qwen-Image")
QWEN = ["experiment=qwen_image_ocr_lora"]
BASE = compose(QWEN, unused=["prompts"])


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stored(folder: Path) -> int:
    """Numbers in all safetensors files below, by their headers."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def test_published_sizes_are_those_of_diffusers_and_transformers() -> None:
    text = sizes.PUBLISHED["Qwen/Qwen-Image"]["text_encoder"]
    own = {key: value for key, value in text.items() if key not in ("vision_config", "tie_word_embeddings")}
    config = Qwen2_5_VLConfig(text_config=own, vision_config=text["vision_config"])
    with torch.device("meta"):
        transformer, vae = QwenImageTransformer2DModel(), AutoencoderKLQwenImage()
        encoder: Any = Qwen2_5_VLForConditionalGeneration(config)
    assert PUBLISHED.transformer.parameters == numbers(transformer) == 20_430_401_088
    assert PUBLISHED.transformer.block_parameters == numbers(transformer.transformer_blocks[0])
    assert PUBLISHED.vae_parameters == numbers(vae)
    assert PUBLISHED.vision_parameters == numbers(encoder.model.visual)
    assert PUBLISHED.text_encoder_parameters == numbers(encoder) - numbers(encoder.model.visual)


@pytest.mark.parametrize("checkpoint", ["nano", "random"])
def test_sizes_of_a_folder_are_those_of_its_files(checkpoint: str, random_checkpoint: Path) -> None:
    folder = recipe_dir("nano") / "checkpoint" if checkpoint == "nano" else random_checkpoint
    told = sizes.read_sizes(str(folder))
    assert told.transformer.parameters == stored(folder / "transformer")
    assert told.text_encoder_parameters + told.vision_parameters == stored(folder / "text_encoder")
    assert told.vae_parameters == stored(folder / "vae")
    assert (told.text_encoder_item, told.vae_item) == (4, 4)


def network(layers: int, heads: int, dtype: torch.dtype, rank: int, held: torch.dtype = torch.float32) -> Any:
    """The trainer's modules, without a checkpoint's way through a file; `held`: the frozen weights' dtype."""
    transformer = make_transformer(layers=layers, heads=heads, head_dim=64, joint_dim=128)
    exact_ops.install_linears(transformer, dtype)
    exact_ops.install_rms_norms(transformer)
    norms = [layer for name, layer in transformer.named_modules() if name.rpartition(".")[2] in policy.BLOCK_NORMS]
    exact_ops.install_layer_norms(norms)
    rope: Any = transformer_qwenimage.ROPE_PER_DEVICE
    rope["cpu"] = rope["cuda"] = exact_ops.exact_rope
    if rank:
        attach_lora(transformer.to(held), rank=rank)
    return transformer.eval()


def kept_by_autograd(transformer: Any, run: Pass, text_width: int, dtype: torch.dtype) -> int:
    """Bytes of the storages that a forward pass saves for backward, each once; not its parameters and tables."""
    side = 16 * math.isqrt(run.image_tokens)
    mask = torch.arange(run.text_tokens) < run.text_tokens - 1
    embeds = torch.randn(run.text_tokens, text_width).to(dtype)
    row = Conditioning(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        spec=resolve({"height": side, "width": side, "true_cfg_scale": 1.0, "prompt_width": len(mask)}),
    )
    tables = (transformer.pos_embed.pos_freqs, transformer.pos_embed.neg_freqs)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *tables)}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents, times = torch.randn(run.rows, run.image_tokens, 64), torch.full((run.rows,), 500.0)
        predicted = velocity(partial(policy.network, transformer), latents, times, [row] * run.rows, dtype)
        sigma = torch.full((run.rows,), 0.5)
        sde_step(predicted, latents, sigma, sigma - 0.1, noise_level=0.7, sde_type="sde", prev_sample=latents + 0.1)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize(
    ("dtype", "rank", "held"),
    [
        (torch.float32, 0, torch.float32),
        (torch.bfloat16, 0, torch.float32),
        (torch.float32, 4, torch.float32),
        (torch.bfloat16, 4, torch.float32),
        (torch.float32, 4, torch.bfloat16),
        (torch.bfloat16, 4, torch.bfloat16),
    ],
)
def test_activations_are_what_autograd_keeps(
    dtype: torch.dtype, rank: int, held: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernel: attention by products, which some CPUs take for so many tokens, keeps less."""
    monkeypatch.setattr("omni_rollout.diffusion.attention.by_products", lambda *_: False)
    assert CONDITIONING_ROWS == products.CONDITIONING_ROWS
    for layers, heads in ((2, 4), (3, 6)):
        transformer = network(layers, heads, dtype, rank, held)
        model = sizes.transformer(transformer.config)
        run = Pass(rows=4, image_tokens=256, text_tokens=64, item=dtype.itemsize, master=held.itemsize)
        for checkpointing in (False, True):
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            measured = kept_by_autograd(transformer, run, 128, dtype)
            derived = saved(model, run, lora=bool(rank), checkpointing=checkpointing)
            tolerance = 0.015 if checkpointing else 0.0075
            assert math.isclose(derived, measured, rel_tol=tolerance), (layers, heads, checkpointing, derived / measured)


def planned(*overrides: str, gpus: str = "8x80") -> Plan:
    return make_plan(make_run(compose([*QWEN, *overrides], unused=["prompts"]), PUBLISHED), Gpus.parse(gpus))


def part(plan: Plan, name: str) -> int:
    return next((one.bytes for one in plan.rank if one.name == name), 0)


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "moments"),
    [
        (["trainer.engine=torch"], 1, 1, 1),
        (["trainer.engine=fsdp2"], 7, 1, 7),
        (["trainer.engine=fsdp2", "trainer.reduce=backward"], 7, 7, 7),
        (["trainer.engine=deepspeed", "trainer.zero_stage=1"], 1, 1, 7),
        (["trainer.engine=deepspeed", "trainer.zero_stage=2"], 1, 7, 7),
        (["trainer.engine=deepspeed", "trainer.zero_stage=3"], 7, 7, 7),
    ],
)
def test_each_engine_cuts_what_it_says(engine: list[str], weights: int, gradients: int, moments: int) -> None:
    """Full weights: 4 bytes of fp32 each for master and gradient, 8 for the moments."""
    plan, each = planned("trainer.lora_rank=0", *engine, gpus="8x40"), 4 * PUBLISHED.transformer.parameters
    assert plan.ranks == 7, "none fits, so as many as leave one engine"
    assert (part(plan, "master weights"), part(plan, "gradients")) == (each // weights, each // gradients)
    assert part(plan, "AdamW's moments") == 2 * each // moments


def test_frozen_weights_are_what_the_checkpoint_has_and_in_one_process_they_are_there_once() -> None:
    frozen, adapted = 2 * PUBLISHED.transformer.parameters, 2 * 60 * 8 * 3072**2
    factors = 4 * PUBLISHED.transformer.lora_parameters(64)
    assert part(planned("trainer.engine=torch"), "policy") == frozen + factors
    assert part(planned("trainer.engine=deepspeed", "trainer.zero_stage=1"), "policy") == 2 * frozen + factors, "of one dtype"
    one = planned(gpus="1x80")
    assert next(each.bytes for each in one.together if each.name == "policy") == adapted + factors
    assert one.fits and one.together_bytes == total(one.together)
    needed = {when: sum(each.bytes for each in one.together if when in each.when) for when in When}
    assert one.together_bytes == max(needed.values()) and len(set(needed.values())) == len(When)
    apart = planned("trainer.engine=deepspeed", gpus="1x80")
    assert next(each.bytes for each in apart.together if each.name == "policy") == 2 * frozen + factors, "not shared"


def test_fewest_ranks_that_fit_and_engines_on_the_rest() -> None:
    plan = planned("trainer.engine=fsdp2", gpus="2x8x80")
    assert (plan.ranks, plan.engines, plan.fits) == (2, 14, True)
    assert make_plan(make_run(compose([*QWEN, "trainer.engine=fsdp2"], unused=["prompts"]), PUBLISHED), plan.gpus, 5).ranks == 5


def test_what_is_proposed_fits_and_could_be_written_so() -> None:
    config: TrainConfig = compose([*QWEN, "trainer.lora_rank=0"], unused=["prompts"])
    gpus = Gpus.parse("8x80")
    assert not make_plan(make_run(config, PUBLISHED), gpus).fits
    proposals = closest(config, PUBLISHED, gpus)
    assert proposals
    for text, plan in proposals:
        again = make_plan(make_run(compose([*QWEN, "trainer.lora_rank=0", *text.split()], unused=["prompts"]), PUBLISHED), gpus)
        assert again.fits and again == plan


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.sampled_from([256, 512, 1024]), st.booleans(), st.sampled_from(list(TrainerEngineName)))
def test_more_rows_pixels_or_kept_activations_need_more(
    rows: int, side: int, checkpointing: bool, engine: TrainerEngineName
) -> None:
    base = BASE

    def needed(rows: int, side: int, checkpointing: bool) -> int:
        trainer = replace(base.trainer, micro_batch_size=rows, gradient_checkpointing=checkpointing, engine=engine)
        sampling = replace(base.sampling, height=side, width=side)
        run = make_run(replace(base, trainer=trainer, sampling=sampling), PUBLISHED)
        return total(make_plan(run, Gpus.parse("8x80"), 4).rank)

    here = needed(rows, side, checkpointing)
    assert needed(rows + 1, side, checkpointing) > here
    assert needed(rows, 2 * side, checkpointing) > here
    assert needed(rows, side, False) >= here >= needed(rows, side, True)


@pytest.mark.parametrize(("tokens", "pairs"), [(None, 4), (10**9, 4), (3 * 1280, 3), (1, 1)])
def test_a_limit_of_tokens_needs_what_as_many_pairs_need(tokens: int | None, pairs: int) -> None:
    def parts(**trainer: Any) -> Any:
        sampling = replace(BASE.sampling, height=512, width=512, true_cfg_scale=1.0)
        collate = replace(BASE.collate, prompt_width=256)
        changed = replace(BASE, sampling=sampling, collate=collate, trainer=replace(BASE.trainer, **trainer))
        return make_plan(make_run(changed, PUBLISHED), Gpus.parse("8x80"), 4).rank

    assert parts(micro_batch_size=4, micro_batch_tokens=tokens) == parts(micro_batch_size=pairs)


def test_pairs_that_learn_together_are_counted_together() -> None:
    config = compose([*QWEN, "algorithm=diffusion_dpo", "trainer.micro_batch_tokens=1"], unused=["prompts"])
    two = replace(config, trainer=replace(config.trainer, micro_batch_tokens=None, micro_batch_size=2))
    limited, whole = (make_plan(make_run(one, PUBLISHED), Gpus.parse("8x80"), 4).rank for one in (config, two))
    assert limited == whole


def test_the_command_prints_writes_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "plan.json"
    assert main(["plan", *QWEN, "trainer.engine=fsdp2", "gpus=8x80", "--json", str(file)]) == 0
    said, made = capsys.readouterr().out, json.loads(file.read_text())
    assert "trainer.ranks=2 rollout.workers=6" in said and made["fits"] and made["ranks"] == 2
    assert main(["plan", *QWEN, "trainer.gradient_checkpointing=false", "gpus=8x80"]) == 1
    assert "closest that fit:\n  trainer.gradient_checkpointing=true: ranks 1, engines 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=8"], "gpus=8: expected GPUSxGIB"),
        (["gpus=0x80"], "gpus=0x80"),
        ([], "gpus has no value"),
        (["gpus=8x80", "model.path=Qwen/Other"], "model.path=Qwen/Other: no such folder"),
        (["gpus=8x80", "trainer.offload=all"], "trainer.offload=all"),
        (["gpus=8x80", "trainer.micro_batch_size=0"], "trainer.micro_batch_size=0"),
    ],
)
def test_what_cannot_be_planned_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QWEN, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_key_is_told(tmp_path: Path) -> None:
    for name in sizes.PARTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has no num_attention_heads"):
        sizes.read_sizes(str(tmp_path))


def test_planning_loads_no_torch() -> None:
    plan = f"from omni_rollout.cli import main; main(['plan', 'gpus=8x80', *{QWEN}])"
    subprocess.run([sys.executable, "-c", f"import sys; {plan}; assert 'torch' not in sys.modules"], check=True)


def test_published_reward_models_are_as_large_as_transformers_makes_them() -> None:
    for name, config in rewards.PUBLISHED.items():
        towers = {part: {**config[part], "num_attention_heads": 16} for part in rewards.DEFAULTS}  # how many changes no size
        given: Any = {**config, **towers}
        with torch.device("meta"):
            assert rewards.clip_parameters(config) == numbers(CLIPModel(CLIPConfig(**given))), name
    with torch.device("meta"):  # what a config.json leaves out
        assert rewards.clip_parameters({}) == numbers(CLIPModel(CLIPConfig()))


def test_reward_models_are_counted_in_one_process_and_lie_on_the_host_on_verl(tmp_path: Path) -> None:
    given = {"pickscore": 1.0, "clip_score": 1.0, "aesthetic": 1.0, "jpeg_compressibility": 1.0}
    weights = [f"+reward.weights.{name}={weight}" for name, weight in given.items()]
    plan, without = planned(*weights, gpus="1x80"), planned(gpus="1x80")
    clip_l, clip_h = 4 * 427_616_513, 4 * 986_109_441  # as their pages on the hub say
    head = 4 * sum(layer.numel() for layer in nn.Sequential(*starmap(nn.Linear, pairwise(rewards.HEAD_WIDTHS))).parameters())
    assert {one.name: one.bytes for one in plan.together if one.name.startswith("reward ")} == {
        "reward clip_score": clip_l,
        "reward pickscore": clip_h,
        "reward aesthetic": head,  # the same CLIP, loaded once
    }
    assert plan.together_bytes - without.together_bytes == clip_l + clip_h + head
    several = planned(*weights, gpus="8x80")
    assert [one.bytes for one in several.hosts if one.name.startswith("reward ")] == [clip_l, clip_h, head]
    assert not [one for one in (*several.together, *several.rank, *several.engine) if one.name.startswith("reward ")]


def test_a_reward_model_of_a_folder_and_one_whose_sizes_nobody_knows(tmp_path: Path) -> None:
    small = CLIPConfig(text_config={"hidden_size": 32, "num_attention_heads": 2}, vision_config={"num_hidden_layers": 1})
    CLIPModel(small).bfloat16().save_pretrained(tmp_path)
    weights = ["+reward.weights.pickscore=1", "+reward.weights.hpsv2=1"]
    plan = planned(*weights, f"+reward.model.pickscore={tmp_path}", "+reward.model.hpsv2=some/other", gpus="1x80")
    found = {one.name: one for one in plan.together if one.name.startswith("reward ")}
    assert found["reward pickscore"].bytes == 2 * stored(tmp_path)
    assert found["reward hpsv2"].bytes == 0 and "NOT counted: no sizes of some/other" in found["reward hpsv2"].why
    assert not [
        one
        for one in planned(*weights, "+reward.source.pickscore=http://localhost:1", gpus="1x80").together
        if "pickscore" in one.name
    ]
