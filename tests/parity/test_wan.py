"""Wan2.2, two experts in one engine: what the engine computed is what the trainer computes, bit for bit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from transformers.utils.import_utils import is_torchvision_available

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models import family_module
from omni_rollout.models.base.channel_norms import NORMS, ByPlanes
from omni_rollout.models.base.encodings import Encodings
from omni_rollout.models.base.policy import Experts, experts
from omni_rollout.models.base.velocity import expert_at
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.checkpoint import load_policy, save_policy
from omni_rollout.policy.lora import attach_lora
from omni_rollout.policy.recompute import recompute
from omni_rollout.policy.state import RunState
from omni_rollout.policy.tensor_files import pending
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

PROMPTS = ("a video of a red digit moving left", "dog", 'two cats on a table, sign "7"')
EXPERTS = ("transformer", "transformer_2")
SCALES = ((1.0, None), (3.0, None), (3.0, 0.0), (1.0, 2.5))  # of the first expert, of the second
RUNS = [("wan2_2", "float32", 2), ("wan2_2", "bfloat16", 1), ("wan2_2_i2v", "float32", 1), ("wan2_2_i2v", "bfloat16", 2)]


@dataclass
class Sides:
    """The rollout engine and the trainer's policy, with the same weights."""

    family: str
    dtype: torch.dtype
    checkpoint: Path
    engine: RolloutEngine
    policy: Experts
    count: int = 0
    original: dict[str, torch.Tensor] = field(default_factory=dict)

    def request(self, seed: int, **sampling: Any) -> RolloutRequest:
        self.count += 1
        family = family_module(self.family, "spec")
        images = family_module(self.family, "probe").pictures(seed)
        values = {"height": 32, "width": 64, "num_inference_steps": 6, "true_cfg_scale": 1.0, "prompt_width": 24, **sampling}
        values["extra"] = {"frames": 5, "flow_shift": 3.0, **values.get("extra", {})}
        return RolloutRequest(
            request_id=f"request-{self.count}",
            prompt=Prompt(text=PROMPTS[seed % 3], images=images),
            spec=family.resolve(values, images),
            seed=seed,
            group_id="g",
            member=seed,
        )

    def mixed(self) -> list[RolloutRequest]:
        """Two sizes, 5 and 9 frames, 6 to 8 steps, with guidance in both experts, in either, in none."""
        requests = []
        for seed in range(8):
            first, second = SCALES[seed % 4]
            extra = {"frames": 9 if seed == 3 else 5, "true_cfg_scale_2": second}
            size = {"height": 64 if seed == 6 else 32, "num_inference_steps": 6 + seed % 3}
            requests.append(self.request(seed, **size, true_cfg_scale=first, extra=extra))
        return requests

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return sorted(self.engine.generate(requests), key=lambda trajectory: trajectory.seed)

    def score(self, trajectories: Sequence[Trajectory], micro_batch_size: int = 3, policy: Any = None) -> list[torch.Tensor]:
        policy = policy or self.policy
        return recompute(policy, trajectories, family=self.family, dtype=self.dtype, micro_batch_size=micro_batch_size)

    def equal(self, trajectories: Sequence[Trajectory], micro_batch_size: int = 3, policy: Any = None) -> bool:
        scored = self.score(trajectories, micro_batch_size, policy)
        return all(torch.equal(t.log_probs, own) and len(own) for t, own in zip(trajectories, scored, strict=True))

    def sync(self, policy: Any = None) -> None:
        named = effective_weights(policy or self.policy, self.dtype)
        self.engine.update_weights(named, self.engine.policy_version + 1)

    def disturb(self, module: torch.nn.Module, size: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wan")
    return {family: build_random(folder / family, family=family, seed=3) for family in ("wan2_2", "wan2_2_i2v")}


@pytest.fixture(scope="module", params=RUNS, ids=["-".join(map(str, run)) for run in RUNS])
def sides(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Sides]:
    family, dtype, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    path = str(checkpoints[family])
    with RolloutEngine(path, family=family, dtype=dtype, max_num_seqs=5) as engine:
        compute = getattr(torch, dtype)
        policy = family_module(family, "policy").load_policy(path, compute)
        pair = Sides(family, compute, checkpoints[family], engine, policy)
        pair.original = {name: value.clone() for name, value in policy.state_dict().items()}
        yield pair
    torch.set_num_threads(before)


@pytest.fixture
def restored(sides: Sides) -> Iterator[Sides]:
    yield sides
    sides.policy.load_state_dict(sides.original)
    sides.sync()


def test_every_log_prob_has_the_same_bits(sides):
    trajectories = sides.generate(sides.mixed())
    for trajectory in trajectories:
        experts_used = {expert_at(trajectory.spec, step) for step in trajectory.step_indices.tolist()}
        assert experts_used == {0, 1}, "a window of both experts"
        assert trajectory.latents.isfinite().all() and trajectory.latents.dtype == torch.float32
    assert {t.spec.guided for t in trajectories} == {True, False}
    sizes = [trajectory.fingerprint["batch_sizes"] for trajectory in trajectories]
    assert any(earlier != later for life in sizes for earlier, later in pairwise(life)) and max(map(max, sizes)) > 1
    for micro_batch_size in (1, 3, 16):
        assert sides.equal(trajectories, micro_batch_size)


@pytest.mark.parametrize("expert", [0, 1])
def test_the_comparison_can_fail_and_each_expert_answers_for_its_steps(sides, restored, expert):
    trajectories = sides.generate(sides.mixed())
    sides.disturb(list(experts(sides.policy).values())[expert], 1e-3)
    for trajectory, scored in zip(trajectories, sides.score(trajectories), strict=True):
        own = torch.tensor([expert_at(trajectory.spec, step) == expert for step in trajectory.step_indices.tolist()])
        assert torch.equal(scored[~own], trajectory.log_probs[~own])
        assert not (scored[own] == trajectory.log_probs[own]).any()


def test_alone_or_in_company_the_bits_are_the_same(sides):
    together = sides.generate(sides.mixed())
    backwards = sides.generate(sides.mixed()[::-1])
    alone = [next(sides.engine.generate([request])) for request in sides.mixed()[:4]]
    for others in (backwards, alone):
        for one, other in zip(together, others, strict=False):
            assert torch.equal(one.latents, other.latents) and torch.equal(one.log_probs, other.log_probs)
            assert (one.media == other.media).all()
            assert all(torch.equal(tensor, other.conditions[name]) for name, tensor in one.conditions.items())


def test_after_an_update_of_both_experts(sides, restored):
    before = sides.generate(sides.mixed()[:3])
    sides.disturb(sides.policy)
    assert not sides.equal(before)
    sides.sync()
    after = sides.generate(sides.mixed())
    assert sides.equal(after) and not torch.equal(before[0].latents, after[0].latents)
    assert {t.policy_version for t in after} == {sides.engine.policy_version}


def test_gradients_reach_every_parameter_with_and_without_checkpointing(sides):
    """Of both experts, each from its own steps; in the exact forward."""
    trajectory = sides.generate([sides.request(1, true_cfg_scale=3.0)])[0]
    from omni_rollout.policy.recompute import Pair, score

    found = []
    for checkpointing in (False, True):
        policy = family_module(sides.family, "policy").load_policy(str(sides.checkpoint), sides.dtype)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        scored = []
        for index, step in enumerate(trajectory.step_indices.tolist()):
            before = {name: p.grad is None for name, p in policy.named_parameters()}
            scored.append(score(policy, [trajectory], [Pair(0, index)], sides.family, sides.dtype).log_prob)
            scored[-1].sum().backward()
            name = list(experts(policy))[expert_at(trajectory.spec, step)]
            touched = {key for key, p in policy.named_parameters() if before[key] and p.grad is not None}
            assert all(key.startswith(f"{name}.") for key in touched)
        assert torch.equal(torch.cat(scored).detach(), trajectory.log_probs)
        gradients = {name: p.grad for name, p in policy.named_parameters()}
        assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
        found.append(gradients)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_lora_of_each_expert_is_exact_and_is_what_diffusers_reads(sides, restored, tmp_path):
    policy = family_module(sides.family, "policy").load_policy(str(sides.checkpoint), sides.dtype)
    factors = attach_lora(policy, rank=4)
    assert len(factors) == 2 * 2 * 8 * 2, "experts, blocks, projections, factors"
    sides.disturb(policy, 0.05)
    sides.sync(policy)
    trajectories = sides.generate(sides.mixed())
    assert sides.equal(trajectories, policy=policy) and not sides.equal(trajectories)
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = pending({"step": torch.tensor(1)})
    save_policy(tmp_path / "c", policy, pending(trained), run=RunState(step=1, weights="w"), optimizer=optimizer)
    other = family_module(sides.family, "policy").load_policy(str(sides.checkpoint), sides.dtype)
    load_policy(tmp_path / "c", other)
    assert sides.equal(trajectories, policy=other)
    for name, folder, into_second in (("transformer", "lora", False), ("transformer_2", "lora_2", True)):
        assert (tmp_path / "c" / folder / LORA_WEIGHT_NAME_SAFE).is_file()
        parts: dict[str, Any] = {n: WanTransformer3DModel.from_pretrained(sides.checkpoint, subfolder=n) for n in EXPERTS}
        base = {key: tensor.clone() for key, tensor in parts[name].state_dict().items()}
        stock = parts[name]
        pipeline: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, **parts)
        pipeline.load_lora_weights(tmp_path / "c" / folder, load_into_transformer_2=into_second)
        stock.fuse_lora()
        merged = dict(effective_weights(getattr(policy, name), torch.float32))
        fused = {key.replace(".base_layer", ""): tensor for key, tensor in stock.state_dict().items()}
        changed = [key for key in merged if key.endswith(("to_q.weight", "to_out.0.weight"))]
        for key in changed:
            torch.testing.assert_close(fused[key].to(sides.dtype).float(), merged[key].float(), rtol=1e-2, atol=1e-5)
        assert changed and not any(torch.equal(fused[key], base[key]) for key in changed)


def test_a_capsule_comes_back_and_still_holds(sides, tmp_path):
    for trajectory in sides.generate(sides.mixed()[1:4]):
        save_capsule(trajectory, tmp_path / "a.safetensors")
        back = load_capsule(tmp_path / "a.safetensors")
        assert back.spec == trajectory.spec and back.kind == "video" and np.array_equal(back.media, trajectory.media)
        assert back.conditions.keys() == trajectory.conditions.keys() and back.prompt.images == trajectory.prompt.images
        assert all(torch.equal(tensor, back.conditions[name]) for name, tensor in trajectory.conditions.items())
        assert sides.equal([back])


def test_a_long_text_and_another_boundary_are_refused_and_the_others_go_on(sides):
    good = sides.mixed()[:2]
    long = replace(sides.request(50), prompt=replace(sides.request(50).prompt, text="a cat and a dog " * 20))
    elsewhere = sides.request(51, extra={"boundary_ratio": 0.5})
    failures: dict[int, str] = {}
    finished = list(sides.engine.generate([*good, long, elsewhere], lambda r, e: failures.update({r.seed: str(e)})))
    assert sorted(t.seed for t in finished) == [0, 1] and sorted(failures) == [50, 51]
    assert "101 text tokens, the fixed width is 24" in failures[50]
    ratio = family_module(sides.family, "spec").RULES.extra["boundary_ratio"].default
    assert f"boundary_ratio={ratio}, the request 0.5" in failures[51]


def test_torchvision_was_not_needed_and_nobody_believes_it_is_there(sides):
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("it is installed here")
    assert not [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
    assert not is_torchvision_available()


def test_the_norms_of_its_vae_are_added_by_planes(sides):
    norms = [layer for layer in sides.engine.pipeline.vae.modules() if type(layer).__name__.startswith(NORMS)]
    assert norms and all(isinstance(norm, ByPlanes) for norm in norms)


def test_images_are_encoded_while_videos_are_decoded(sides, monkeypatch):
    """The engine's thread encodes, two decode: each has the VAE's memory of earlier frames to itself."""
    if sides.family == "wan2_2":
        pytest.skip("it encodes no images")
    pipeline, request = sides.engine.pipeline, sides.request(1, extra={"frames": 9})
    latents = torch.randn(1, *family_module(sides.family, "spec").layout(request.spec).latent)
    monkeypatch.setattr(pipeline, "encodings", Encodings(0))  # encodes again each time
    stop = Event()

    def encoded() -> torch.Tensor:
        return pipeline.encoded(request.prompt, request.spec).conditions["condition"]

    def encode() -> list[torch.Tensor]:
        found = []
        with torch.inference_mode():
            while not stop.is_set():
                found.append(encoded())
        return found

    def decode() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [pipeline.decode_beside_the_loop(latents, request.spec) for _ in range(4)]

    with torch.inference_mode(), ThreadPoolExecutor(3) as pool:
        quiet, condition = pipeline.decode(latents, request.spec), encoded()
        encoding, *decoding = pool.submit(encode), pool.submit(decode), pool.submit(decode)
        decoded = [video for one in decoding for video in one.result()]
        stop.set()
        encoded = encoding.result()
    assert all(torch.equal(video, quiet) for video in decoded)
    assert encoded and all(torch.equal(one, condition) for one in encoded)


def test_the_video_is_that_of_stock_diffusers_on_the_same_sigmas(sides, monkeypatch):
    """ODE, the same noise. fp32: stock products run as they come, which costs roundings and nothing more."""
    if sides.dtype is not torch.float32:
        pytest.skip("stock diffusers keeps parts in fp32 where the engine does not")
    request = sides.request(4, sde_type="ode", true_cfg_scale=3.0, extra={"true_cfg_scale_2": 2.0, "frames": 9})
    pipeline, last, kept = type(sides.engine.pipeline), [], []
    decode, encode = pipeline.decode, pipeline.encode
    monkeypatch.setattr(pipeline, "decode", lambda own, x, spec: (last.append(x[:1].clone()), decode(own, x, spec))[1])
    monkeypatch.setattr(pipeline, "encode", lambda own, prompt, spec: (kept.append(encode(own, prompt, spec)), kept[-1])[1])
    (trajectory,) = sides.engine.generate([request])
    told = kept[0]
    shape = (1, *family_module(sides.family, "spec").layout(request.spec).latent)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    stock = [WanTransformer3DModel.from_pretrained(sides.checkpoint, subfolder=name) for name in EXPERTS]
    ratio = request.spec.extra["boundary_ratio"]
    with torch.no_grad():
        for t in scheduler.timesteps:
            second = bool(t < ratio * 1000)
            seen = torch.cat([x, *(c[None] for c in told.conditions.values())], dim=1)
            yes, no = (
                stock[second](seen, t[None], text[None], return_dict=False)[0]
                for text in (told.prompt_embeds, told.negative_prompt_embeds)
            )
            x = scheduler.step(no + (2.0 if second else 3.0) * (yes - no), t, x, return_dict=False)[0]
    gap = (x - last[0]).abs().max().item()
    assert gap <= 2e-5 * x.abs().max().item(), gap
    vae: Any = AutoencoderKLWan.from_pretrained(sides.checkpoint, subfolder="vae")
    mean, std = (torch.tensor(n)[None, :, None, None, None] for n in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        pixels = vae.decode(last[0] * std + mean, return_dict=False)[0][0]
    video = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert video.shape == trajectory.media.shape
    different = np.abs(video.astype(int) - trajectory.media.astype(int))
    assert different.max() <= 1 and (different > 0).mean() < 1e-3
    print(f"latents differ by up to {gap:.3g} of {x.abs().max():.3g}; pixels: {(different > 0).sum()} of {different.size}")
