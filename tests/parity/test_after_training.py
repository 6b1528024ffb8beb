"""A checkpoint is sampled, evaluated, scored and exported as what it is; stock diffusers loads what was exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.errors import UserError
from omni_rollout.launch.compose import compose
from omni_rollout.launch.progress import Progress
from omni_rollout.models.base.sizes import DECODE_ROWS
from omni_rollout.models.qwen_image import spec
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.nano.random_weights import build_random
from omni_rollout.parity.replay import replay_capsules
from omni_rollout.policy.checkpoint import save_policy
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.tensor_files import pending
from omni_rollout.rollout.to_folder import engine_of, sample_to_folder
from omni_rollout.run.evaluate import evaluate
from omni_rollout.run.export import export
from omni_rollout.run.model_card import write_card
from omni_rollout.run.restore import put_into, restored_policy
from omni_rollout.run.resume import run_state
from omni_rollout.run.source import Source, find_source
from omni_rollout.trajectories.digest import combined_digest, tensor_digests
from omni_rollout.types import Prompt, RolloutRequest
from tests.parity.test_qwen_relatives_stock import decoded_in_batches

TEXT, STEPS = "a photo of a cat", 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("after")


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    """Text as wide as it is and the profile `reference`, as diffusers' own pipeline has them."""
    build_random(folder / "model", seed=4)
    (folder / "prompts.txt").write_text(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", subfolder="tokenizer")
    width = spec.text_tokens(tokenizer, TEXT, spec.resolve({"prompt_width": 1}))
    words = f"""model.path={folder}/model prompts={folder}/prompts.txt collate.prompt_width={width} sampling.height=64
        sampling.width=64 sampling.num_inference_steps={STEPS} sampling.true_cfg_scale=1.0 reward=jpeg_compressibility
        parity=reference trainer.lora_rank=4 trainer.ema_decay=0.9 evaluation.images=3 run_dir={folder}/run"""
    return compose(words.split())


@pytest.fixture(scope="module")
def saved(folder: Path, config: TrainConfig) -> Path:
    """What a run with a LoRA leaves, its average of half the size in B."""
    policy = load_policy(config.model.path, torch.float32, config.parity.value)
    attach_lora(policy, rank=4)
    generator = torch.Generator().manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for name, tensor in weights.items():
        if ".lora_B." in name:
            tensor.normal_(std=0.05, generator=generator)
    average = {name: tensor / 2 if ".lora_B." in name else tensor for name, tensor in weights.items()}
    digest = combined_digest(tensor_digests(effective_weights(policy, torch.float32)))
    state = run_state(config, step=2, weights=digest, wandb_id=None, lines={})
    tensors = {"optimizer": pending({"step": torch.tensor(0)}), "average": pending(average)}
    save_policy(folder / "run/checkpoints/step_00002", policy, pending(weights), run=state, **tensors)
    return folder / "run"


def source_of(saved: Path, weights: str = "policy") -> Source:
    source = find_source(str(saved), weights)
    assert source is not None
    return source


@pytest.fixture(scope="module")
def evaluated(folder: Path, config: TrainConfig, saved: Path) -> Path:
    evaluate(config, folder / "evaluated", Progress(shown=False), source_of(saved))
    return folder / "evaluated"


@pytest.fixture(scope="module")
def exported(folder: Path, config: TrainConfig, saved: Path) -> Path:
    for to, weights in (("pipeline", "policy"), ("lora", "policy"), ("transformer", "ema")):
        export(config, source_of(saved, weights), to, folder / "exported" / to)
    return folder / "exported"


def stock_images(pipeline: Any, index: list[dict[str, Any]]) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    made = [
        pipeline(
            prompt=line["prompt"],
            height=64,
            width=64,
            num_inference_steps=STEPS,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(line["seed"]),
            output_type="np",
        ).images[0]
        for line in index
    ]
    return (np.stack(made) * 255).round().astype(np.uint8)


def test_stock_diffusers_makes_the_images_of_the_evaluation(evaluated: Path, exported: Path, config: TrainConfig) -> None:
    """Bit for bit with diffusers' forward in the project's products; by diffusers' own, values differ by rounding alone."""
    index = [json.loads(line) for line in (evaluated / "index.jsonl").read_text().splitlines()]
    ours = np.stack([np.asarray(Image.open(evaluated / line["file"])) for line in index])
    assert len(ours) == 3 and len({line["seed"] for line in index}) == 3
    at_export = replace(config, model=replace(config.model, path=str(exported / "pipeline")))
    same_products = QwenImagePipeline.from_pretrained(exported / "pipeline", transformer=restored_policy(at_export, None))
    decoded_in_batches(same_products.vae, DECODE_ROWS)
    assert np.array_equal(stock_images(same_products, index), ours)

    adapted = QwenImagePipeline.from_pretrained(config.model.path)
    without = stock_images(adapted, index)
    adapted.load_lora_weights(exported / "lora")
    for pipeline in (QwenImagePipeline.from_pretrained(exported / "pipeline"), adapted):
        gap = np.abs(stock_images(pipeline, index).astype(int) - ours)
        print(f"\n{(gap > 0).sum()} of {ours.size} values differ from stock diffusers', by up to {gap.max()}")
        assert gap.max() <= 1 and (gap > 0).mean() < 1e-3
    assert np.abs(without.astype(int) - ours).max() > 1, "the adapter changes what is made, by more than rounding"


def test_what_is_exported_is_bit_for_bit_what_the_engine_sampled_with(
    evaluated: Path, exported: Path, saved: Path, config: TrainConfig
) -> None:
    facts = json.loads((evaluated / "metrics.json").read_text())
    state = source_of(saved).run
    transformer = QwenImageTransformer2DModel.from_pretrained(exported / "pipeline" / "transformer")
    assert combined_digest(tensor_digests(transformer.named_parameters())) == facts["weights"] == state.weights
    base = QwenImagePipeline.from_pretrained(config.model.path)
    base.load_lora_weights(exported / "lora")
    base.fuse_lora()
    base.unload_lora_weights()
    fused = dict(base.transformer.named_parameters())
    assert all(torch.equal(tensor, fused[name]) for name, tensor in transformer.named_parameters())
    averaged = QwenImageTransformer2DModel.from_pretrained(exported / "transformer" / "transformer")
    assert not torch.equal(averaged.transformer_blocks[0].attn.to_q.weight, transformer.transformer_blocks[0].attn.to_q.weight)


@pytest.mark.parametrize(("unscaled", "right"), [(True, True), (False, False)])
def test_a_program_that_reads_no_alpha_adds_the_right_product(
    unscaled: bool, right: bool, exported: Path, saved: Path, config: TrainConfig
) -> None:
    """ComfyUI's reading of this layout: B A by `transformer.<layer>.lora_A|lora_B.weight`; alpha only where it is a tensor."""
    path = exported / "lora" if unscaled else saved / "checkpoints/step_00002/lora"
    factors = load_file(path / "pytorch_lora_weights.safetensors")
    base = QwenImageTransformer2DModel.from_pretrained(config.model.path, subfolder="transformer")
    merged = QwenImageTransformer2DModel.from_pretrained(exported / "pipeline" / "transformer").state_dict()
    layers = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    assert layers and not [name for name in factors if "lora" not in name]
    for layer in layers:
        own = f"{layer.removeprefix('transformer.')}.weight"
        added = base.state_dict()[own] + factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        assert torch.equal(added, merged[own]) is right


def test_the_card_tells_every_file_and_no_path_of_this_machine(exported: Path, folder: Path) -> None:
    for to in ("pipeline", "lora", "transformer"):
        card = (exported / to / "README.md").read_text()
        files = [path for path in (exported / to).rglob("*") if path.is_file() and path.name != "README.md"]
        assert all(f"| {path.relative_to(exported / to)} | " in card for path in files)
        assert "| trainer.lora_rank | 4 |" in card and "jpeg_compressibility" in card
        assert not [path for path in [*files, exported / to / "README.md"] if str(folder).encode() in path.read_bytes()]


def test_the_card_names_a_base_of_the_hub_and_describes_one_of_this_machine(
    exported: Path, config: TrainConfig, saved: Path, tmp_path: Path
) -> None:
    card = (exported / "lora" / "README.md").read_text()
    assert "base_model:" not in card and 'from_pretrained("PATH OF THE BASE MODEL"' in card
    assert "\nThe base model was a folder named model, of family qwen_image; a run keeps no digest of what" in card
    hub = replace(config, model=replace(config.model, path="Qwen/Qwen-Image"))
    write_card(hub, source_of(saved), "lora", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: Qwen/Qwen-Image\n") and "The base model was" not in card
    assert 'from_pretrained("Qwen/Qwen-Image"' in card


@pytest.fixture
def engine(config: TrainConfig, evaluated: Path) -> Iterator[Any]:
    with engine_of(replace(config, parity=type(config.parity)["exact"]), Progress(shown=False), None) as engine:
        yield engine


def test_capsules_of_a_checkpoint_hold_with_it_alone(
    engine: Any, config: TrainConfig, saved: Path, folder: Path, tmp_path: Path
) -> None:
    exact = replace(config, parity=type(config.parity)["exact"])
    resolved = spec.resolve(
        {"height": 64, "width": 64, "num_inference_steps": STEPS, "true_cfg_scale": 1.0, "prompt_width": 16}
    )

    def sampled(name: str) -> list[Path]:
        request = RolloutRequest(
            request_id=f"{name}-00", prompt=Prompt(text=TEXT), spec=resolved, seed=1, group_id=name, member=0
        )
        sample_to_folder(engine, [request], tmp_path / name, Progress(shown=False))
        return [tmp_path / name / f"{name}-00.safetensors"]

    of_base = sampled("base")
    found = {}
    for weights in ("policy", "ema"):
        put_into(engine, exact, source_of(saved, weights))
        found[weights] = sampled(weights)
    line = json.loads((tmp_path / "policy" / "index.jsonl").read_text())
    assert (line["file"], line["prompt"], line["policy_version"]) == ("policy-00.png", TEXT, 2)
    for weights, capsules in found.items():
        for scored, holds in ((source_of(saved, weights), True), (None, False)):
            (replayed,) = replay_capsules(exact, capsules, scored)
            assert (replayed.holds, not replayed.not_honoured) == (holds, holds)
            assert replayed.other_version == (None if holds else 2)
    assert replay_capsules(exact, of_base)[0].holds
    assert not replay_capsules(exact, found["ema"], source_of(saved))[0].holds

    build_random(folder / "other", seed=5)
    other = replace(exact, model=replace(exact.model, path=str(folder / "other")))
    with pytest.raises(UserError, match="is another than the run was started from; give that one"):
        put_into(engine, other, source_of(saved))


def test_a_run_that_sampled_with_its_old_policy_is_shown_as_what_it_trained(
    engine: Any, config: TrainConfig, saved: Path, tmp_path: Path
) -> None:
    """DiffusionNFT's: the digest in the checkpoint is of the old policy, for that is what the engine held."""
    exact = replace(config, parity=type(config.parity)["exact"])
    trained, old = (restored_policy(exact, source_of(saved, weights)) for weights in ("policy", "ema"))
    factors = [{name: value.detach() for name, value in one.named_parameters() if ".lora_" in name} for one in (trained, old)]
    digests = [combined_digest(tensor_digests(effective_weights(one, torch.float32))) for one in (trained, old)]
    for written, fits in ((digests[1], True), ("0" * 64, False)):
        state = run_state(config, step=2, weights=written, wandb_id=None, lines={})
        folder = tmp_path / written / "checkpoints/step_00002"
        tensors = {"optimizer": pending({"step": torch.tensor(0)}), "old": pending(factors[1])}
        save_policy(folder, trained, pending(factors[0]), run=state, **tensors)
        with nullcontext() if fits else pytest.raises(UserError, match="another than the run was started from"):
            put_into(engine, exact, source_of(tmp_path / written))
        assert engine.weights_digest == digests[0] != digests[1]
