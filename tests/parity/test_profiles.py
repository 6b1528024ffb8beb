"""What each parity profile promises, and that a knob which would break the exact one is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import float32_by_onednn
from omni_rollout.errors import PinnedKnobError
from omni_rollout.models.qwen_image.policy import load_policy
from omni_rollout.policy.recompute import recompute
from omni_rollout.rollout.engine import RolloutEngine
from tests.parity.conftest import Sides


def differences(checkpoint: str, dtype: str, parity: str) -> torch.Tensor:
    """Rollout minus trainer, over eight mixed requests, before and after a weight update."""
    sides = object.__new__(Sides)
    sides._count = 0
    compute = getattr(torch, dtype)
    found = []
    with RolloutEngine(checkpoint, dtype=dtype, max_num_seqs=5, parity=parity) as engine:
        policy = load_policy(checkpoint, compute, parity)
        for version in range(2):
            engine.update_weights(effective_weights(policy, compute), version)
            trajectories = list(engine.generate(sides.mixed()))
            assert {t.fingerprint["parity"] for t in trajectories} == {parity}
            scored = recompute(policy, trajectories, family="qwen_image", dtype=compute, micro_batch_size=16)
            found += [trajectory.log_probs - ours for trajectory, ours in zip(trajectories, scored, strict=True)]
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.01)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_profile_is_exact(checkpoint, dtype):
    assert not differences(checkpoint, dtype, "reference").any()


def test_fast_profile_keeps_up_with_the_weights_and_is_exact_where_onednn_multiplies_on_both_sides_alone(checkpoint):
    gap = differences(checkpoint, "float32", "fast").abs()
    assert gap.max() < 1e-5, "other roundings at most, the same weights: stale ones would differ by 1e-2"
    assert gap.any() or float32_by_onednn()


def test_fast_profile_reads_every_row_of_a_batch(checkpoint):
    """The output projections' input is a slice of the joint sequence; read as if it were whole, gaps were 0.1."""
    assert differences(checkpoint, "bfloat16", "fast").abs().max() < 5e-3


@pytest.mark.parametrize("cap", ["AVX2", "AVX512_CORE"])
def test_the_fast_profile_multiplies_where_onednn_may_not_use_amx(cap):
    """vLLM's packed bf16 kernel ended the process where the CPU has AMX and oneDNN may not use it."""
    code = (
        "import torch, vllm._C; from types import SimpleNamespace; "
        "from omni_rollout.rollout.platform.linear import PackedLinearMethod; "
        "weight, bias = torch.ones(128, 128, dtype=torch.bfloat16), torch.ones(128, dtype=torch.bfloat16); "
        "layer = SimpleNamespace(weight=weight, bias=bias); method = PackedLinearMethod(); "
        "method.process_weights_after_loading(layer); "
        "assert (method.apply(layer, torch.ones(300, 128, dtype=torch.bfloat16), bias) == 129).all()"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": cap}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_changed_attention_backend_is_refused_by_name(checkpoint, monkeypatch):
    from omni_rollout.rollout.platform.attention import CpuSDPABackend, CpuSDPAImpl

    class SomeOtherImpl(CpuSDPAImpl):
        pass

    monkeypatch.setattr(CpuSDPABackend, "get_impl_cls", staticmethod(lambda: SomeOtherImpl))
    with pytest.raises(PinnedKnobError, match=r"attention .*SomeOtherImpl"):
        RolloutEngine(checkpoint)


def test_a_changed_trainer_backend_is_refused_by_name(checkpoint):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry._active_backend = AttentionBackendName._NATIVE_MATH
    try:
        with pytest.raises(PinnedKnobError, match="_native_math"):
            load_policy(checkpoint, torch.float32)
    finally:
        _AttentionBackendRegistry._active_backend = before
