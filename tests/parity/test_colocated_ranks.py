"""Two ranks of a trainer with an engine in each process: the engine has a world of its own, and the bits of one that is alone.

Run as a script it is one rank; the tests look at what the ranks wrote.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from omni_rollout.config import CollateConfig, ModelConfig, TrainConfig, TrainerConfig, TrainerEngineName
from omni_rollout.errors import UserError
from omni_rollout.models.qwen_image.sizes import read_sizes
from omni_rollout.models.qwen_image.spec import resolve
from omni_rollout.plan.memory import process_parts
from omni_rollout.plan.split import make_run
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.trainer_engines.torch_engine import MOMENTS
from omni_rollout.rollout import own_world
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.trajectories.capsule import load_capsule, save_capsule
from omni_rollout.types import Prompt, RolloutRequest, Trajectory

RANKS = 2
ENGINES: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 2},  # first: it shares what it does not train with the engine, as that was loaded
    "ddp": {"engine": TrainerEngineName.torch},
    "fsdp2": {"engine": TrainerEngineName.fsdp2},
    "zero3": {"engine": TrainerEngineName.deepspeed, "zero_stage": 3},
    "zero3 lora": {"engine": TrainerEngineName.deepspeed, "zero_stage": 3, "lora_rank": 2, "gradient_checkpointing": True},
}
ADVANTAGES = torch.tensor([1.0, -0.4, 0.7, -1.0])
ENVIRONMENT = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}  # not to be touched


def config_of(checkpoint: Path, name: str, ranks: int) -> TrainConfig:
    trainer = TrainerConfig(
        ranks=ranks, learning_rate=1e-3, warmup_steps=0, micro_batch_size=2, clip_range=10.0, ema_decay=0.75, **ENGINES[name]
    )
    return TrainConfig(model=ModelConfig(path=str(checkpoint)), trainer=trainer)


def requests(step: int, *, negative_prompt_width: int = 16) -> list[RolloutRequest]:
    sampling = {"height": 64, "width": 64, "num_inference_steps": 3, "true_cfg_scale": 2.0, "prompt_width": 24}
    spec = resolve({**sampling, "negative_prompt_width": negative_prompt_width})
    prompt = Prompt(text="a red sign that says 42")
    return [
        RolloutRequest(request_id=f"{step}-{n:02}", prompt=prompt, spec=spec, seed=9 * step + n, group_id=str(step), member=n)
        for n in range(len(ADVANTAGES))
    ]


def sampled(engine: RolloutEngine, asked: list[RolloutRequest]) -> list[Trajectory]:
    return sorted(engine.generate(asked), key=lambda trajectory: trajectory.request_id)


def whole_parameters() -> int:
    """Bytes of parameters that are alive, trained, and not cut; what lives in a cycle is let go first."""
    gc.collect()
    trained = [one for one in gc.get_objects() if type(one) is nn.Parameter and one.requires_grad]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in trained}.values())


def of_zero3(learner: Learner) -> dict[str, int]:
    """Bytes of what DeepSpeed holds after an update, by the names that plan has for them."""
    zero = cast(Any, learner.engine)._engine.optimizer
    (bucket,) = zero.ipg_buckets.values()
    held = {
        "policy": [cast(Any, one).ds_tensor for one in learner.policy.parameters()],
        "optimizer's copy": zero.fp32_partitioned_groups_flat,
        "gradients": [zero.grad_partitions_flat_buffer],
        "AdamW's moments": [state[key] for state in zero.optimizer.state.values() for key in MOMENTS],
        "reduce bucket": [bucket.buffer],
    }
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in held.items()}


@contextmanager
def watched_gathering(learner: Learner) -> Iterator[list[int]]:
    """Bytes of parameters that are whole, or on their way, each time that ZeRO-3 has gathered those of a layer."""
    seen: list[int] = []
    if learner.config.trainer.zero_stage < 3:
        yield seen
        return
    coordinator = cast(Any, learner.engine)._engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def fetched(*args: Any, **kwargs: Any) -> None:
        fetch(*args, **kwargs)
        seen.append(sum(one.untyped_storage().nbytes() for one in learner.policy.parameters()))

    coordinator.fetch_sub_module = fetched
    yield seen
    coordinator.fetch_sub_module = fetch


def run_case(folder: Path, engine: RolloutEngine, name: str, rank: int) -> dict[str, Any]:
    """Each rank samples its share, learns from all, and gives its engine the new weights; then each samples the same."""
    held = engine.policy_tensors() if name == "lora" else None
    before = whole_parameters()
    learner = Learner(config_of(folder / "checkpoint", name, RANKS), rank=rank, ranks=RANKS, held=held)
    whole = whole_parameters() - before
    start = engine.update_weights(learner.weights(), 0)
    shares: list[Any] = [None] * RANKS
    dist.all_gather_object(shares, sampled(engine, requests(1)[rank::RANKS]))
    trajectories = sorted((one for share in shares for one in share), key=lambda one: one.request_id)
    scored = learner.old_log_probs(trajectories, ADVANTAGES, 1, recomputed=True)
    with watched_gathering(learner) as in_two_passes:
        update, _ = learner.step(trajectories, ADVANTAGES, [one.log_probs for one in trajectories], 1)
    digest = engine.update_weights(learner.weights(), 1)
    for trajectory in sampled(engine, requests(2)):
        save_capsule(trajectory, folder / f"{name}-{rank}-{trajectory.request_id}.safetensors")
    average = engine.update_weights(learner.weights("average"), 1)
    weights = {tensor: value.clone() for tensor, value in learner.weights()}
    if rank == 0:
        save_file(weights, folder / f"{name}.safetensors")
        for trajectory in trajectories:
            save_capsule(trajectory, folder / f"{name}-{trajectory.request_id}.safetensors")
    with watched_gathering(learner) as in_one_pass:
        for step in (2, 3) if name == "zero3 lora" else ():  # the first is watched by DeepSpeed, which then fetches ahead
            dist.all_gather_object(shares, sampled(engine, requests(step, negative_prompt_width=24)[rank::RANKS]))
            one_width = sorted((one for share in shares for one in share), key=lambda one: one.request_id)
            learner.step(one_width, ADVANTAGES, [one.log_probs for one in one_width], step)
    return {
        "engine's log-probs": all(torch.equal(a, b.log_probs) for a, b in zip(scored, trajectories, strict=True)),
        "norms": update.grad_norms,
        "whole": whole,
        "zero3": of_zero3(learner) if name.startswith("zero3") else {},
        "gathered": [max(seen, default=0) for seen in (in_one_pass, in_two_passes)],
        "parameters": len(list(learner.policy.parameters())),
        "digests": [start, digest, average],
    }


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    with RolloutEngine(str(folder / "checkpoint"), max_num_seqs=4) as engine:
        results = {name: run_case(folder, engine, name, rank) for name in ENGINES}
    total = torch.tensor(rank)
    dist.all_reduce(total)  # the engine is closed, the ranks still meet
    results["the ranks' group"] = {
        "is there": dist.group.WORLD is group and dist.get_rank() == rank and int(total) == sum(range(RANKS)),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT} == ENVIRONMENT,
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colocated")
    (folder / "checkpoint").symlink_to(random_checkpoint)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(600) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def alone(ran: Path) -> dict[str, list[Trajectory]]:
    """The same requests, of an engine in a process that is no rank, with the weights that the ranks came to."""
    found = {}
    with RolloutEngine(str(ran / "checkpoint"), max_num_seqs=4) as engine:
        found["start"] = sampled(engine, requests(1))
        for name in ENGINES:
            engine.update_weights(load_file(ran / f"{name}.safetensors").items(), 1)
            found[name] = sampled(engine, requests(2))
    return found


def same(one: Trajectory, other: Trajectory) -> bool:
    return torch.equal(one.latents, other.latents) and torch.equal(one.log_probs, other.log_probs)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_beside_a_rank_samples_the_bits_of_one_that_is_alone(ran, alone, name):
    first = [load_capsule(ran / f"{name}-{one.request_id}.safetensors") for one in requests(1)]
    assert all(map(same, first, alone["start"]))
    for rank in range(RANKS):
        then = [load_capsule(ran / f"{name}-{rank}-{one.request_id}.safetensors") for one in requests(2)]
        assert all(map(same, then, alone[name]))
        assert then[0].fingerprint["weights"] == alone[name][0].fingerprint["weights"] != first[0].fingerprint["weights"]


@pytest.mark.parametrize("name", ENGINES)
def test_all_engines_are_given_the_weights_of_all_ranks(ran, alone, name):
    one, other = (json.loads((ran / f"{rank}.json").read_text())[name] for rank in range(RANKS))
    assert one == other and one["engine's log-probs"]
    start, digest, average = one["digests"]
    assert (start, digest) == (alone["start"][0].fingerprint["weights"], alone[name][0].fingerprint["weights"])
    assert len({start, digest, average}) == 3


def test_nobody_holds_what_an_engine_has_cut(ran):
    found = json.loads((ran / "0.json").read_text())
    assert found["ddp"]["whole"] > 0 and found["fsdp2"]["whole"] <= 0 and found["zero3"]["whole"] <= 0


def planned(folder: Path, name: str, **collate: int) -> dict[str, int]:
    config = replace(config_of(folder / "checkpoint", name, RANKS), collate=CollateConfig(prompt_width=24, **collate))
    sampling = replace(config.sampling, true_cfg_scale=2.0)
    run = make_run(replace(config, sampling=sampling), read_sizes(str(folder / "checkpoint")))
    return {part.name: part.bytes for part in process_parts(run, RANKS)}


@pytest.mark.parametrize("name", ["zero3", "zero3 lora"])
def test_plan_counts_what_zero3_holds(ran, name):
    """Of each parameter every rank has equally many numbers: up to one more than its share."""
    found, parts = json.loads((ran / "0.json").read_text())[name], planned(ran, name)
    parts["policy"] = parts.get("policy", parts.get("master weights"))
    more = {part: held - parts[part] for part, held in found["zero3"].items()}
    assert all(0 <= padding <= 8 * found["parameters"] for padding in more.values()), more


def test_plan_counts_what_zero3_gathers(ran):
    """Of frozen weights under checkpointing a block stays until its backward pass is over, and some of the next is fetched."""
    one_pass, two_passes = json.loads((ran / "0.json").read_text())["zero3 lora"]["gathered"]
    block = planned(ran, "zero3 lora", negative_prompt_width=24)["gathered weights"]
    everything = planned(ran, "zero3 lora", negative_prompt_width=16)["gathered weights"]
    assert 0.9 * block < one_pass < 1.5 * block < 0.85 * everything < two_passes <= everything


@pytest.mark.parametrize("kind", ["lora", "ddp"])
def test_a_rank_takes_the_step_of_a_trainer_that_is_alone(ran, kind):
    trajectories = [load_capsule(ran / f"{kind}-{one.request_id}.safetensors") for one in requests(1)]
    learner = Learner(config_of(ran / "checkpoint", kind, 1))
    update, _ = learner.step(trajectories, ADVANTAGES, [one.log_probs for one in trajectories], 1)
    for name in ENGINES if kind == "ddp" else ["lora", "zero3 lora"]:
        norms = json.loads((ran / "0.json").read_text())[name]["norms"]
        assert (norms == pytest.approx(update.grad_norms, rel=1e-6)) == (("lora" in name) == (kind == "lora")), name


def test_the_ranks_keep_their_group_and_their_environment(ran):
    for rank in range(RANKS):
        assert json.loads((ran / f"{rank}.json").read_text())["the ranks' group"] == {"is there": True, "environment": True}


def test_an_engine_without_a_world_of_its_own_ends_the_group_of_its_process(random_checkpoint, monkeypatch):
    """What `own_world` is for: the day that this fails, it is not needed."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    monkeypatch.setenv("RANK", "7")
    with RolloutEngine(str(random_checkpoint)):
        assert dist.group.WORLD is group and os.environ["RANK"] == "7"
    assert dist.group.WORLD is group
    monkeypatch.setattr(own_world, "_no_default_group", nullcontext)
    with RolloutEngine(str(random_checkpoint)) as engine:
        assert os.environ["RANK"] == "0"
        monkeypatch.setattr(engine._world, "_group", None)
    assert not dist.is_initialized()


def test_another_release_is_refused(monkeypatch):
    monkeypatch.setattr(own_world, "version", {"torch": "2.13.0+cpu", "vllm-omni": "0.30.0"}.__getitem__)
    with pytest.raises(UserError, match=r"vllm-omni 0\.30\.0 is installed: expected 0\.28\.\*"):
        own_world.check_releases()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # Python's own end may stop gloo's thread in the middle of freeing a tensor: SIGABRT (torch 2.13)
