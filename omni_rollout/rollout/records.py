"""Between our records and vllm-omni's: what its engine is asked, and what is made of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from omni_rollout.models import family_module
from omni_rollout.trajectories.digest import tensor_digest
from omni_rollout.types import RolloutRequest, Trajectory

PACKAGES = ("torch", "vllm-omni", "diffusers", "transformers")


def engine_request(request: RolloutRequest, serial: int) -> OmniDiffusionRequest:
    # Guidance and noise travel in extra_args: the engine's own fields would split batches and turn 0.0 into 4.0.
    return OmniDiffusionRequest(
        prompt={"prompt": request.prompt.text},
        request_id=f"{request.request_id}#{serial}",  # the engine remembers ids; the same request may be sampled again
        sampling_params=OmniDiffusionSamplingParams(
            height=request.spec.height,
            width=request.spec.width,
            num_inference_steps=request.spec.num_inference_steps,
            num_frames=family_module(request.spec.family, "spec").layout(request.spec).frames,
            seed=request.seed,
            generator_device="cpu",
            extra_args={
                "spec": request.spec.to_json(),
                "prompt": request.prompt.to_json(),
                "target": None if request.target is None else request.member,
            },
        ),
    )


def together(requests: Iterable[RolloutRequest]) -> list[RolloutRequest]:
    """Requests that may share forward passes one after another, kind after kind as each first comes.

    The engine admits in order, and only what may run beside what is running: an odd one between others splits their batch.
    """
    kinds: dict[tuple[object, ...], list[RolloutRequest]] = {}
    for request in requests:
        spec = request.spec
        layout = family_module(spec.family, "spec").layout(spec)
        widths = spec.prompt_width, spec.negative_prompt_width if spec.guided else None
        kinds.setdefault((layout.latent, layout.grid, spec.num_inference_steps, *widths), []).append(request)
    return [request for kind in kinds.values() for request in kind]


def package_versions() -> dict[str, str]:
    """Of what computes, by package."""
    return {name: version(name) for name in PACKAGES}


def fingerprint(dtype: str, parity: str, weights: str) -> dict[str, Any]:
    """What a trajectory says of the engine that samples it, but for its machine."""
    return {
        "dtype": dtype,
        "attention": "TORCH_SDPA" if parity != "fast" else "engine default",
        "parity": parity,
        "versions": package_versions(),
        "weights": weights,
    }


def to_trajectory(
    request: RolloutRequest, record: Mapping[str, Any], media: np.ndarray, fingerprint: Mapping[str, Any]
) -> Trajectory:
    """`record` as `RolloutMixin.post_decode` makes it; `fingerprint`: what is the engine's own."""

    def own(name: str) -> torch.Tensor:  # inference tensors cannot be saved for a backward pass; their clones can
        return record[name].clone().cpu()

    guided = request.spec.guided
    return Trajectory(
        latents=own("latents"),
        log_probs=own("log_probs"),
        step_indices=torch.tensor(request.spec.step_indices, dtype=torch.int64),
        sigmas=own("sigmas"),
        timesteps=own("timesteps"),
        prompt_embeds=own("prompt_embeds"),
        prompt_embeds_mask=own("prompt_embeds_mask"),
        negative_prompt_embeds=own("negative_prompt_embeds") if guided else None,
        negative_prompt_embeds_mask=own("negative_prompt_embeds_mask") if guided else None,
        conditions={name: tensor.clone().cpu() for name, tensor in record["conditions"].items()},
        media=media,
        prompt=request.prompt,
        spec=request.spec,
        seed=request.seed,
        group_id=request.group_id,
        member=request.member,
        policy_version=record["policy_version"],
        fingerprint={
            **fingerprint,
            "prompt_width": request.spec.prompt_width,
            "negative_prompt_width": request.spec.negative_prompt_width if guided else None,
            "guided": guided,
            "batch_sizes": record["batch_sizes"],
            **_source(request, record),
        },
    )


def _source(request: RolloutRequest, record: Mapping[str, Any]) -> dict[str, str]:
    """What the latents were made from: noise, or an image that was given."""
    if request.target is not None:
        return {"target": request.target.sha256}
    return {"initial_noise": tensor_digest(record["initial_noise"])[:16]}
