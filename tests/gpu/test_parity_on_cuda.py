"""The parity claim on a CUDA device. Run with: pytest -m gpu. Written, and not yet run."""

from __future__ import annotations

import pytest
import torch

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.nano.random_weights import build_random
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.types import Prompt, RolloutRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_log_probs_are_equal_on_cuda(tmp_path, dtype, micro_batch_size):
    build_random(tmp_path, layers=4, heads=8, head_dim=64)
    compute = getattr(torch, dtype)
    spec = resolve({"height": 256, "width": 256, "num_inference_steps": 8, "true_cfg_scale": 4.0, "prompt_width": 64})
    requests = [
        RolloutRequest(request_id=f"{i}", prompt=Prompt(text="a red cat"), spec=spec, seed=i, group_id="g", member=i)
        for i in range(8)
    ]
    with RolloutEngine(str(tmp_path), dtype=dtype, max_num_seqs=8) as engine:
        policy = load_policy(str(tmp_path), compute).to("cuda")
        engine.update_weights(effective_weights(policy, compute), 0)
        trajectories = list(engine.generate(requests))
        scored = recompute(policy, trajectories, family="qwen_image", dtype=compute, micro_batch_size=micro_batch_size)
    gaps = torch.cat([trajectory.log_probs - ours for trajectory, ours in zip(trajectories, scored, strict=True)])
    assert not gaps.any(), f"largest gap {gaps.abs().max():.1e}; see docs/parity.md for what to check"
