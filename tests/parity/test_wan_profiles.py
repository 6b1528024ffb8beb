"""What each parity profile promises for Wan2.2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from omni_rollout.config import TrainConfig
from omni_rollout.diffusion import attention
from omni_rollout.diffusion.exact_ops import effective_weights
from omni_rollout.diffusion.machine import float32_by_onednn
from omni_rollout.models.wan2_2.policy import load_policy
from omni_rollout.nano.random_weights import build_random
from omni_rollout.parity.matrix import Cell
from omni_rollout.parity.probe import Probe
from omni_rollout.rollout.engine import RolloutEngine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_random(tmp_path_factory.mktemp("wan") / "c", family="wan2_2", seed=7))


def measured(checkpoint: str, dtype: str, parity: str) -> list[Any]:
    """Before and after an update."""
    config, compute = TrainConfig(), getattr(torch, dtype)
    config.model.path, config.model.family = checkpoint, "wan2_2"
    config.sampling.extra = {"frames": 5}
    with RolloutEngine(checkpoint, family="wan2_2", dtype=dtype, max_num_seqs=3, parity=parity) as engine:
        sides = Probe(engine, load_policy(checkpoint, compute, parity), config)
        cell = Cell(dtype=dtype, guidance=3.0, width="24", in_flight="staggered")
        found = [sides.cell(cell, 3).measure]
        with torch.no_grad():
            for parameter in sides.policy.parameters():
                parameter.mul_(1.01)
        engine.update_weights(effective_weights(sides.policy, compute), 1)
        return [*found, sides.cell(cell, 3).measure]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_profile_is_exact(checkpoint, dtype):
    assert all(measure.exact for measure in measured(checkpoint, dtype, "reference"))


def test_fast_profile_keeps_up_with_the_weights_and_is_exact_where_onednn_multiplies_on_both_sides_alone(checkpoint):
    gaps = [measure.max_abs_diff for measure in measured(checkpoint, "float32", "fast")]
    assert all(gap < 1e-5 for gap in gaps), "other roundings at most, the same weights: stale ones would differ by 1e-2"
    assert all(gaps) or float32_by_onednn()


@pytest.mark.parametrize(("parity", "least", "most"), [("reference", 0.0, 1e-5), ("exact", 1e-4, 3e-2)])
def test_the_reference_rounds_where_stock_diffusers_does(checkpoint, parity, least, most):
    """In bfloat16, of weights that bfloat16 holds, so that only the places of rounding differ."""
    generator = torch.Generator().manual_seed(0)
    video, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 16, 2, 4, 6), (2, 20, 64)))
    told = {"hidden_states": video, "timestep": torch.tensor([731.4, 12.3]), "encoder_hidden_states": text}
    stock: Any = WanTransformer3DModel.from_pretrained(Path(checkpoint), subfolder="transformer_2", torch_dtype=torch.bfloat16)
    policy = load_policy(checkpoint, torch.bfloat16, parity)
    with torch.no_grad():
        for name, parameter in policy.transformer_2.named_parameters():
            parameter.copy_(parameter.bfloat16().float())
            stock.get_parameter(name).copy_(parameter)
        theirs = stock(**told, return_dict=False)[0].float()
        ours = policy(expert=1, **told, return_dict=False)[0].float()
    gap = ((ours - theirs).norm() / theirs.norm()).item()
    assert least <= gap <= most, gap
    print(parity, gap)


@pytest.mark.parametrize("parity", ["exact", "fast", "reference"])
def test_the_exact_profile_alone_attends_by_products(checkpoint, parity, monkeypatch):
    """The others keep torch's kernel: the engine's in `fast`, stock diffusers' in `reference`."""
    seen = []

    def by_products(*given: torch.Tensor) -> bool:
        seen.append(given)
        return False

    monkeypatch.setattr(attention, "by_products", by_products)
    policy = load_policy(checkpoint, torch.bfloat16, parity)
    told = {"hidden_states": torch.randn(1, 16, 1, 4, 4), "encoder_hidden_states": torch.randn(1, 20, 64)}
    with torch.no_grad():
        policy(expert=0, timestep=torch.ones(1), **{name: given.bfloat16() for name, given in told.items()}, return_dict=False)
    assert bool(seen) == (parity == "exact")
