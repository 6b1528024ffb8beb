"""An expert that no loss went through stays as it is, moments and all; the other moves as if it were alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.config import TrainerEngineName as EngineName
from omni_rollout.models.base.policy import Experts
from omni_rollout.policy.tensor_files import collected
from omni_rollout.policy.trainer_engines import TrainerEngine, make_trainer_engine
from omni_rollout.policy.update import check_ranks_agree

NAMES = ("transformer", "transformer_2")
ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
ONE, OTHER, BOTH = (0,), (1,), (0, 1)


def transformer(seed: int) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def make(engine: str, zero_stage: int, ranks: int = 1) -> tuple[nn.Module, TrainerEngine]:
    policy = Experts({name: transformer(seed) for seed, name in enumerate(NAMES)})
    config = TrainerConfig(engine=EngineName[engine], zero_stage=zero_stage, weight_decay=0.1, ranks=ranks)
    return policy, make_trainer_engine(config, policy, list(policy.parameters()))


def update(trainer: TrainerEngine, used: tuple[int, ...], number: int, rows: tuple[int, ...] = (0,)) -> float:
    """One step on the sum over the experts used and the rows, expert by expert."""
    for expert in used:
        for row in rows:
            loss = (trainer.module(expert=expert, **inputs(10 * number + row, expert))[0] ** 2).mean()
            trainer.backward(loss, last=(expert, row) == (used[-1], rows[-1]))
    return trainer.step(1e-2, idle={name for place, name in enumerate(NAMES) if place not in used})


def inputs(number: int, expert: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(10 * number + expert)
    return {
        "hidden_states": torch.randn(2, 4, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=generator),
        "encoder_hidden_states_mask": None,
        "timestep": torch.rand(2, generator=generator),
        "img_shapes": [[(1, 2, 2)]] * 2,
        "return_dict": False,
    }


def values(trainer: TrainerEngine) -> dict[str, torch.Tensor]:
    return {name: trainer.whole(name, part).make().clone() for name, part in trainer.parts().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_an_idle_expert_is_not_moved(engine: str, stage: int) -> None:
    """Not by decay, not by momentum: and with it back, all engines go on with the same bits."""
    _, trainer = make(engine, stage)
    _, expected = make("torch", 0)
    for number, used in enumerate((ONE, BOTH, ONE, OTHER, BOTH)):
        before = values(trainer)
        assert update(trainer, used, number) == update(expected, used, number)
        assert differing(before, values(trainer)) == {NAMES[expert] for expert in used}, (number, used)
        assert not differing(values(trainer), values(expected))
    state = collected(trainer.state_dict())
    assert (int(state["transformer.step"]), int(state["transformer_2.step"])) == (4, 3)


def test_the_expert_that_moves_moves_as_if_it_were_alone() -> None:
    _, trainer = make("torch", 0)
    alone = transformer(1)
    other = make_trainer_engine(TrainerConfig(weight_decay=0.1), alone, list(alone.parameters()))
    for number, used in enumerate((ONE, OTHER, OTHER)):  # its bias correction counts its own steps
        norm = update(trainer, used, number)
        if used == OTHER:
            other.backward((alone(**inputs(10 * number, 1))[0] ** 2).mean(), last=True)
            assert other.step(1e-2) == norm
    own = {f"transformer_2.{name}": parameter for name, parameter in alone.named_parameters()}
    assert all(torch.equal(own[name], value) for name, value in values(trainer).items() if name in own)


@pytest.mark.parametrize(("saver", "loader"), [(0, 2), (1, 3), (2, 1), (3, 0), (3, 4), (4, 2)])
@pytest.mark.parametrize("first", [ONE, OTHER])
def test_state_with_an_expert_that_never_moved(saver: int, loader: int, first: tuple[int, ...]) -> None:
    _, whole = make(*ENGINES[saver])
    update(whole, first, 0)
    state, weights = collected(whole.state_dict()), values(whole)
    idle = NAMES[1 - first[0]]
    assert int(state[f"{idle}.step"]) == 0 and not any(n.startswith(f"{idle}.") for n in state if n != f"{idle}.step")
    policy, _ = make("torch", 0)
    policy.load_state_dict(weights, strict=False)
    config = TrainerConfig(engine=EngineName[ENGINES[loader][0]], zero_stage=ENGINES[loader][1], weight_decay=0.1)
    trainer = make_trainer_engine(config, policy, list(policy.parameters()))
    trainer.load_state_dict(state)
    loaded = collected(trainer.state_dict())
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    for number, used in ((1, BOTH), (2, first)):
        assert update(trainer, used, number) == update(whole, used, number)
    assert not differing(values(trainer), values(whole))
    with pytest.raises(ValueError, match=r"no `transformer_2\.step`"):
        trainer.load_state_dict({"transformer.step": torch.tensor(0)})


def one_of_two(rank: int, folder: Path) -> None:
    """A rank: do orders that differ stop it, and what does each engine make of two experts?"""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    check_ranks_agree(NAMES)
    result: dict[str, Any] = {"norms": {}, "idle kept": {}}
    try:
        check_ranks_agree(NAMES if rank == 0 else NAMES[::-1])
    except RuntimeError as error:
        result["refused"] = str(error)
    for engine, stage in RANKED:
        _, trainer = make(engine, stage, ranks=2)
        norms, kept = [], []
        for number, used in enumerate(UPDATES):
            before = values(trainer)
            norms.append(update(trainer, used, number, rows=ROWS[rank::2]))
            kept.append(differing(before, values(trainer)) == {NAMES[expert] for expert in used})
        result["norms"][f"{engine}{stage}"], result["idle kept"][f"{engine}{stage}"] = norms, all(kept)
        save_file(values(trainer), folder / f"{rank}-{engine}{stage}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


ROWS, UPDATES = (0, 1, 2, 3), (ONE, BOTH, OTHER, BOTH)
RANKED = [("torch", 0), ("fsdp2", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)]) for rank in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    return folder


def test_ranks_that_would_meet_in_different_experts_do_not_begin(ranks: Path) -> None:
    for rank in range(2):
        said = json.loads((ranks / f"{rank}.json").read_text())["refused"]
        assert said.startswith("rank 1 would compute with the experts ['transformer_2', 'transformer']")


@pytest.mark.parametrize(("engine", "stage"), RANKED)
def test_two_ranks_move_two_experts_as_one_process_does(ranks: Path, engine: str, stage: int) -> None:
    """Every expert's gradients are summed over the ranks, also of the one that the update's last pass did not go through."""
    _, whole = make("torch", 0)
    norms = [update(whole, used, number, rows=ROWS) for number, used in enumerate(UPDATES)]
    told = [json.loads((ranks / f"{rank}.json").read_text()) for rank in range(2)]
    found = [load_file(ranks / f"{rank}-{engine}{stage}.safetensors") for rank in range(2)]
    assert all(one["idle kept"][f"{engine}{stage}"] for one in told) and not differing(*found)
    for one in told:
        assert one["norms"][f"{engine}{stage}"] == pytest.approx(norms, rel=1e-5)
    for name, value in values(whole).items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    one_of_two(int(sys.argv[2]), Path(sys.argv[1]))
    os._exit(0)  # Python's own end may stop gloo's thread in the middle of freeing a tensor: SIGABRT (torch 2.13)
