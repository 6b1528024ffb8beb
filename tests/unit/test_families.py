"""What shared code does for families that are not Qwen-Image: parents, experts, conditions, media, parameters of their own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image

from omni_rollout import models
from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import TrainerConfig
from omni_rollout.data.prompts import group_id, load_prompts
from omni_rollout.diffusion.exact_ops import effective_weights, install_linears
from omni_rollout.diffusion.guidance import guide
from omni_rollout.diffusion.schedule import build_schedule, linear_sigmas
from omni_rollout.diffusion.sde import gaussian_kl, sde_step
from omni_rollout.errors import UserError
from omni_rollout.models import family_module, family_of
from omni_rollout.models.base import policy as base_policy
from omni_rollout.models.base.images import open_image
from omni_rollout.models.base.policy import Experts, batch_keys, experts
from omni_rollout.models.base.sampling import Extra, resolve, resolve_extra
from omni_rollout.models.base.velocity import Conditioning, velocity
from omni_rollout.models.qwen_image import spec as qwen
from omni_rollout.models.qwen_image import velocity as qwen_velocity
from omni_rollout.policy.checkpoint import load_policy, save_policy
from omni_rollout.policy.lora import attach_lora, has_lora
from omni_rollout.policy.recompute import stochastic_pairs
from omni_rollout.policy.state import RunState
from omni_rollout.policy.tensor_files import pending
from omni_rollout.policy.update import PolicyUpdate
from omni_rollout.rewards import WeightedSum
from omni_rollout.trajectories.capsule import CapsuleError, load_capsule, save_capsule
from omni_rollout.trajectories.media import save_media
from omni_rollout.trajectories.sheet import image_grid
from omni_rollout.types import Layout, Prompt, RequestError, SamplingSpec, Trajectory

BOUNDARY = 2


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family with a parent, two experts, a scale for each, a condition of 3 tokens beside the target, and no folder."""
    name = "child"
    rules = replace(
        qwen.RULES,
        family=name,
        images=(0, 1),
        extra={
            "boundary_step": Extra(default=BOUNDARY, types=(int,)),
            "second_scale": Extra(default=1.0, types=(float,), check=lambda value: value >= 0, expected="0 or more"),
        },
    )

    def layout(spec: SamplingSpec) -> Layout:
        own = qwen.layout(spec)
        return replace(own, grid=(*own.grid, (1, 1, 3)), conditions={"image_latents": (3, None)})

    def scales(rows: Any, expert: int) -> list[float]:
        return [row.spec.extra["second_scale"] if expert else row.spec.true_cfg_scale for row in rows]

    def inputs(latents: torch.Tensor, rows: Any, dtype: torch.dtype) -> dict[str, Any]:
        beside = torch.stack([row.conditions["image_latents"] for row in rows])
        return {**qwen_velocity.inputs(latents, rows, dtype), "hidden_states": torch.cat([latents, beside], dim=1).to(dtype)}

    spec = SimpleNamespace(
        **{key: value for key, value in vars(qwen).items() if not key.startswith("__")} | {
            "PARENT": "qwen_image", "RULES": rules, "layout": layout, "EXPERTS": ("transformer", "transformer_2"),
            "expert": lambda spec, step: int(step >= spec.extra["boundary_step"]),
            "resolve": lambda values, images=(): resolve(values, rules, images),
        }
    )  # fmt: skip
    own = SimpleNamespace(**{**vars(qwen_velocity), "scales": scales, "inputs": inputs, "renormalise": lambda _: False})
    package = ModuleType(f"omni_rollout.models.{name}")
    package.__path__ = []
    for part, module in (("", package), (".spec", spec), (".velocity", own)):
        module.__spec__ = SimpleNamespace(name=part)
        monkeypatch.setitem(sys.modules, f"omni_rollout.models.{name}{part}", cast(Any, module))
    monkeypatch.setattr(models, "families", lambda: ["child", "qwen_image"])
    return name


def trajectory(family: str, steps: int = 5, seed: int = 0, **extra: Any) -> Trajectory:
    sizes = {"height": 32, "width": 32, "num_inference_steps": steps, "prompt_width": 4, "true_cfg_scale": 3.0}
    spec = family_module(family, "spec").resolve({**sizes, "extra": extra})
    generator = torch.Generator().manual_seed(seed)
    stochastic = len(spec.step_indices)
    return Trajectory(
        latents=torch.randn(stochastic + 1, 4, 8, generator=generator),
        log_probs=torch.randn(stochastic, generator=generator),
        step_indices=torch.tensor(spec.step_indices),
        sigmas=torch.linspace(1, 0, steps + 1),
        timesteps=1000 * torch.linspace(1, 0, steps + 1)[:-1],
        prompt_embeds=torch.randn(4, 12, generator=generator),
        prompt_embeds_mask=torch.ones(4, dtype=torch.bool),
        negative_prompt_embeds=torch.randn(4, 12, generator=generator),
        negative_prompt_embeds_mask=torch.ones(4, dtype=torch.bool),
        conditions={"image_latents": torch.randn(3, 8, generator=generator)},
        media=np.zeros((32, 32, 3), np.uint8),
        prompt=Prompt(text="a cat"),
        spec=spec,
        seed=seed,
        group_id="g",
        member=seed,
        policy_version=0,
        fingerprint={"dtype": "float32"},
    )


def transformer(seed: int) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    made = QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    install_linears(made, torch.float32)
    return made


def two() -> Experts:
    return Experts({"transformer": transformer(0), "transformer_2": transformer(1)})


def test_what_a_family_has_no_file_for_is_its_parents(child: str) -> None:
    assert family_module(child, "spec").PARENT == "qwen_image"
    assert family_module(child, "weights") is family_module("qwen_image", "weights")
    assert family_module(child, "velocity") is not family_module("qwen_image", "velocity")
    assert family_of(transformer(0)) == "qwen_image"


def test_steps_of_one_trajectory_are_batched_by_expert(child: str) -> None:
    keys = batch_keys([trajectory(child), trajectory(child, steps=6, seed=1), trajectory(child, boundary_step=1)])
    assert [len(set(row)) for row in keys] == [2, 2, 2]
    assert keys[0][:BOUNDARY] == keys[1][:BOUNDARY] and keys[0][-1] == keys[1][-1] == keys[2][1] != keys[0][0]


def test_the_velocity_of_two_experts(child: str) -> None:
    """The first is guided, in one pass, the second not; both see the condition; the target alone comes out."""
    row = base_policy.conditioning(trajectory(child), torch.device("cpu"))
    calls: list[dict[str, Any]] = []

    def network(**inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return inputs["hidden_states"] * (
            1 + torch.stack([text.mean() for text in inputs["encoder_hidden_states"]])[:, None, None]
        )

    latents, times = torch.randn(1, 4, 8), torch.tensor([500.0])
    first = velocity(network, latents, times, [row], torch.float32, expert=0)
    assert [call["expert"] for call in calls] == [0] and calls[0]["hidden_states"].shape == (2, 7, 8)
    assert row.negative_prompt_embeds is not None
    positive, negative = (latents * (1 + text.mean()) for text in (row.prompt_embeds, row.negative_prompt_embeds))
    assert torch.equal(first, negative + 3.0 * (positive - negative)) and calls[0]["img_shapes"] == 2 * [[(1, 2, 2), (1, 1, 3)]]
    second = velocity(network, latents, times, [row], torch.float32, expert=1)
    assert [call["expert"] for call in calls] == [0, 1] and torch.equal(second, positive)


def test_rows_of_other_sizes_do_not_share_a_pass() -> None:
    def key(height: int, width: int) -> object:
        spec = qwen.resolve({"height": height, "width": width, "true_cfg_scale": 1.0, "prompt_width": 2})
        text, mask = torch.zeros(2, 4), torch.ones(2, dtype=torch.bool)
        none: Any = {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
        return Conditioning(prompt_embeds=text, prompt_embeds_mask=mask, spec=spec, **none).batch_key(0)

    assert key(32, 64) == key(32, 64) != key(64, 32), "as many tokens, another grid"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_compute_with_one_expert_at_a_time(child: str, ranks: int) -> None:
    rows = [trajectory(child, seed=seed, boundary_step=boundary) for seed, boundary in enumerate((1, 4, 4, 4, 2))]
    order, scored = [], []
    for rank in range(ranks):
        engine: Any = None
        trainer = TrainerConfig(micro_batch_size=2)
        update = PolicyUpdate(engine, FlowGRPO(), trainer, family=child, dtype=torch.float32, rank=rank, ranks=ranks)
        passes = update._passes(rows, batch_keys(rows), [[pair] for pair in stochastic_pairs(rows)])
        order.append([rows[p[0].row].spec.extra["boundary_step"] <= rows[p[0].row].step_indices[p[0].index] for p, _ in passes])
        scored += [pair for pairs, own in passes if own for pair in pairs]
    assert all(one == order[0] == sorted(order[0]) for one in order)
    assert len(scored) == len(set(scored)) == sum(len(row.step_indices) for row in rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_checkpoint_of_two_experts(tmp_path: Path, rank: int) -> None:
    policy = two()
    assert list(experts(policy)) == ["transformer", "transformer_2"]
    if rank:
        for factor in attach_lora(policy, rank=rank):
            factor.data.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(factor.numel())))
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    weights, optimizer = pending(trained), pending({"step": torch.tensor(1)})
    save_policy(tmp_path / "c", policy, weights, run=RunState(step=1, weights="w"), optimizer=optimizer, average=weights)
    folders = {path.name for path in (tmp_path / "c").iterdir() if path.is_dir()} - {"ema"}
    assert folders == ({"lora", "lora_2"} if rank else {"transformer", "transformer_2"})
    other = Experts({"transformer": transformer(2 if not rank else 0), "transformer_2": transformer(3 if not rank else 1)})
    saved = load_policy(tmp_path / "c", other)
    assert has_lora(other) == bool(rank)
    ours, theirs = (dict(effective_weights(one, torch.float32)) for one in (policy, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name.split(".")[0] for name in ours} == {"transformer", "transformer_2"}
    assert saved.average is not None and saved.average.keys() == trained.keys()
    assert all(torch.equal(saved.average[name], tensor) for name, tensor in trained.items())


def test_a_capsule_with_conditions_comes_back(child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_rollout.trajectories import contract

    monkeypatch.setattr(contract, "families", models.families)
    before = trajectory(child)
    save_capsule(before, tmp_path / "a.safetensors")
    after = load_capsule(tmp_path / "a.safetensors")
    assert torch.equal(after.conditions["image_latents"], before.conditions["image_latents"])
    assert after.spec == before.spec and after.spec.family == child and after.spec.extra["boundary_step"] == BOUNDARY
    short = {"image_latents": before.conditions["image_latents"][:2]}
    for wrong, message in ((short, r"conditions\.image_latents: shape \[2, 8\]"), ({}, r"conditions\.image_latents: missing")):
        with pytest.raises(CapsuleError, match=message):
            save_capsule(replace(before, conditions=wrong), tmp_path / "b.safetensors")


def test_parameters_of_a_family_alone_are_checked(child: str) -> None:
    rules = family_module(child, "spec").RULES
    assert resolve_extra({"second_scale": 2.0}, rules) == {"boundary_step": BOUNDARY, "second_scale": 2.0}
    for given, message in (
        ({"second_scal": 1.0}, "did you mean second_scale"),
        ({"second_scale": True}, "expected float"),
        ({"second_scale": -1.0}, "expected 0 or more"),
    ):
        with pytest.raises(RequestError, match=message):
            resolve_extra(given, rules)
    with pytest.raises(RequestError, match="the prompt has 1, qwen_image takes none"):
        image: Any = object()
        qwen.resolve({"prompt_width": 4}, [image])


@pytest.mark.parametrize("shape", [(4, 8), (16, 2, 4, 4)])
def test_the_step_has_no_rank_of_its_own(shape: tuple[int, ...]) -> None:
    sample, noise = torch.randn(3, *shape), torch.randn(3, *shape)
    told = {"noise_level": 0.7, "sde_type": "sde"}
    drawn = sde_step(noise, sample, 0.8, 0.6, generator=torch.Generator().manual_seed(0), **told)  # type: ignore[arg-type]
    flat = sde_step(
        noise.reshape(3, -1, 2), sample.reshape(3, -1, 2), 0.8, 0.6, prev_sample=drawn.prev_sample.reshape(3, -1, 2), **told
    )  # type: ignore[arg-type]
    assert torch.equal(drawn.log_prob, flat.log_prob) and drawn.log_prob.shape == (3,)
    kl = gaussian_kl(drawn.mean, drawn.mean + 1, drawn.step_std)
    assert torch.equal(kl, gaussian_kl(flat.mean, flat.mean + 1, flat.step_std))
    plain = guide(sample, noise, torch.tensor([1.0, 2.0, 3.0]), renormalise=False)
    assert torch.equal(plain[2], noise[2] + 3.0 * (sample[2] - noise[2]))


def test_a_static_shift_is_that_of_the_formula() -> None:
    sigmas = build_schedule({"use_dynamic_shifting": True}, linear_sigmas(10), shift=3.0).sigmas
    expected = [3 * s / (1 + 2 * s) for s in np.linspace(1, 0.1, 10)]
    torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0], dtype=torch.float32), rtol=0, atol=2e-7)


def made(shape: tuple[int, ...]) -> Trajectory:
    return replace(trajectory("qwen_image"), media=np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def test_media_are_saved_as_people_open_them(tmp_path: Path) -> None:
    layers, video = made((2, 8, 8, 4)), made((5, 8, 8, 3))
    assert [path.name for path in save_media(layers, tmp_path / "a.b")] == ["a.b.0.png", "a.b.1.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.b.1.png")), layers.media[1])
    (path,) = save_media(video, tmp_path / "v")
    with Image.open(path) as opened:
        frames = []
        for number in range(cast(Any, opened).n_frames):
            opened.seek(number)
            frames.append(np.asarray(opened.convert("RGB")))
    assert path.name == "v.webp" and np.array_equal(np.stack(frames), video.media)


def test_every_kind_is_shown_and_what_is_none_is_refused() -> None:
    media = [made(shape).media for shape in ((8, 8, 3), (5, 8, 8, 3), (2, 8, 8, 4))]
    assert image_grid([("a", one) for one in media]).size[0] > 24
    with pytest.raises(ValueError, match="expected uint8"):
        image_grid([("a", np.zeros((2, 2, 8, 8, 3), np.uint8))])


def test_a_reward_refuses_a_kind_it_cannot_score_by_name() -> None:
    rewards = WeightedSum({"jpeg_compressibility": 1.0})
    rewards.check([], "image")
    with pytest.raises(UserError, match="reward jpeg_compressibility scores image, this model makes video"):
        rewards.check([], "video")


def test_input_images_name_the_group_by_their_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "blue", "images": "a.png", "text": "4"}\n{"prompt": "blue", "text": "4"}\n')
    with_image, without = load_prompts(tmp_path / "p.jsonl")
    (image,) = with_image.images
    assert (image.height, image.width) == (4, 8) and with_image.metadata == without.metadata == {"text": "4"}
    assert group_id(with_image) != group_id(without) and Prompt.from_json(with_image.to_json()) == with_image
    assert group_id(with_image) == group_id(replace(with_image, images=(replace(image, path="elsewhere"),)))
    assert open_image(image).size == (8, 4)
    Image.new("RGB", (8, 4), "blue").save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="its sha256 differs"):
        open_image(image)
    (tmp_path / "q.jsonl").write_text('{"prompt": "blue", "images": ["no.png"]}\n')
    with pytest.raises(UserError, match=r"line 1: image no\.png cannot be read"):
        load_prompts(tmp_path / "q.jsonl")
