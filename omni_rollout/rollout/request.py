"""A `RolloutRequest` in the words of vllm-omni's engine."""

from __future__ import annotations

from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from omni_rollout.models import family_module
from omni_rollout.types import RolloutRequest


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
            extra_args={"spec": request.spec.to_json(), "prompt": request.prompt.to_json()},
        ),
    )
