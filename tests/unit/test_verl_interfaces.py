"""What verl expects of the classes that we derive from its own, read from its source: a change of verl's fails here."""

from __future__ import annotations

import ast
import asyncio
import inspect
import runpy
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tensordict import TensorDict

pytest.importorskip("verl")

from verl.experimental.agent_loop.agent_loop import AgentLoopManager as VerlAgentLoopManager
from verl.experimental.reward_loop import RewardLoopManager
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.plugin.platform import PlatformBase
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.ray import RayWorkerGroup
from verl.trainer import main_ppo
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.trainer.ppo.v1 import PPOTrainer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.workers.rollout.replica import RolloutReplica

from omni_rollout.errors import UserError
from omni_rollout.integrations import verl as ours
from omni_rollout.integrations.verl.agent_loop import AgentLoopManager, AgentLoopWorker
from omni_rollout.integrations.verl.colocated import ColocatedRank
from omni_rollout.integrations.verl.launch import verl_config
from omni_rollout.integrations.verl.platform import CpuPlatform
from omni_rollout.integrations.verl.rank import TrainerRank
from omni_rollout.integrations.verl.records import adopt
from omni_rollout.integrations.verl.replica import Replica
from omni_rollout.integrations.verl.reward import RewardManager, RewardWorkers, to_score
from omni_rollout.integrations.verl.trainer import OmniTrainer, WatchedReplayBuffer
from omni_rollout.launch.compose import compose
from omni_rollout.rewards import WeightedSum
from omni_rollout.types import Prompt

BASES: dict[type, type] = {
    CpuPlatform: PlatformBase,
    Replica: RolloutReplica,
    AgentLoopManager: VerlAgentLoopManager,
    RewardManager: RewardManagerBase,
    RewardWorkers: RewardLoopManager,
    OmniTrainer: PPOTrainer,
    WatchedReplayBuffer: ReplayBuffer,
    TrainerRank: Worker,
    ColocatedRank: Worker,
}
NOT_VERLS = {  # ours where verl does not make the call
    (TrainerRank, "__init__"): "made by OmniTrainer, with our section of the configuration",
    (AgentLoopManager, "generate_sequences"): "called by OmniTrainer, which does not wait for it",
}
NOT_REACHED = {  # named in verl's loop under a condition that our configuration never meets
    "_compute_values": "critic.enable is false",
    "_update_critic": "critic.enable is false",
    "critic_wg": "critic.enable is false",
    "_compute_ref_log_prob": "no KL loss or reward of verl's; ours is in the ranks",
    "ref_policy_wg": "no KL loss or reward of verl's; ours is in the ranks",
    "teacher_model_manager": "no distillation",
    "_compute_reward_colocate": "no reward model of verl's",
    "_log_rollout_data": "trainer.rollout_data_dir is null",
    "_save_checkpoint": "trainer.save_freq is -1; ours are written elsewhere",
    "start_profile": "global_profiler.steps is null",
    "stop_profile": "global_profiler.steps is null",
}


def methods(cls: type) -> dict[str, Any]:
    """Name -> what the class itself defines: functions, properties, class and static methods."""
    kinds = (property, classmethod, staticmethod)
    return {name: value for name, value in vars(cls).items() if inspect.isfunction(value) or isinstance(value, kinds)}


def unwrapped(value: Any) -> Callable[..., Any]:
    inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.unwrap(inner)


def mismatches(cls: type, base: type) -> Iterator[str]:
    """Every way in which verl could call a method of `base` must be a way to call that of `cls`."""
    for name, value in methods(cls).items():
        theirs = inspect.getattr_static(base, name, None)
        if theirs is None or not methods_of_mro(base).get(name) or (cls, name) in NOT_VERLS:
            continue
        if (kind := type(value)) is not type(theirs):
            yield f"{cls.__name__}.{name} is a {kind.__name__}, verl's a {type(theirs).__name__}"
            continue
        mine, wanted = unwrapped(value), unwrapped(theirs)
        if inspect.iscoroutinefunction(mine) != inspect.iscoroutinefunction(wanted):
            yield f"{cls.__name__}.{name} and verl's are not both coroutines"
        yield from refused(f"{cls.__name__}.{name}", inspect.signature(mine), inspect.signature(wanted))


def methods_of_mro(cls: type) -> dict[str, Any]:
    return {name: value for parent in reversed(cls.__mro__) for name, value in methods(parent).items()}


def refused(name: str, mine: inspect.Signature, wanted: inspect.Signature) -> Iterator[str]:
    """With all that verl's takes, by name, and with no more than it needs, by position."""
    first, *rest = [p for p in wanted.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # self or cls
    needed = [p.name for p in rest if p.default is p.empty]
    try:
        mine.bind(first.name, **{p.name: None for p in rest})
        mine.bind(first.name, *needed)
    except TypeError as error:
        yield f"{name}{mine}: verl's is {wanted}: {error}"


@pytest.mark.parametrize(("cls", "base"), BASES.items(), ids=lambda cls: cls.__name__)
def test_our_methods_can_be_called_as_verls(cls: type, base: type) -> None:
    assert issubclass(cls, base)
    assert not inspect.isabstract(cls), sorted(getattr(cls, "__abstractmethods__", ()))
    assert not list(mismatches(cls, base))


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_every_method_is_an_override_or_called_by_us(cls: type) -> None:
    """An override of what verl has renamed would be left there, never called."""
    source = "\n".join(path.read_text() for path in Path(ours.__file__).parent.glob("*.py"))
    inherited = dir(BASES[cls])
    assert not [name for name in methods(cls) if name not in inherited and f".{name}" not in source]


def reached(cls: type, starts: Iterable[str]) -> Iterator[ast.AST]:
    """The nodes of the methods of `cls` that these run, by way of `self`, the branches not taken included."""
    todo, seen = list(starts), set()
    while todo:
        name = todo.pop()
        if name in seen or name in NOT_REACHED:
            continue
        seen.add(name)
        for parent in cls.__mro__:  # super() runs the others
            if name not in methods(parent) or parent is object:
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(unwrapped(vars(parent)[name]))))
            called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and is_super(node.func)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and is_self(node):
                    todo.append(node.attr)
                yield node
            if name not in called:
                break


def is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"


def own(nodes: Iterable[ast.AST], context: type[ast.expr_context]) -> set[str]:
    """The attributes of `self` that are read (Load) or set (Store)."""
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and is_self(node)]
    return {node.attr for node in attributes if isinstance(node.ctx, context)}


def there(cls: type, starts: Iterable[str]) -> set[str]:
    declared = {name for parent in cls.__mro__ for name in vars(parent).get("__annotations__", ())}
    return set(dir(cls)) | declared | own(reached(cls, starts), ast.Store)


def never_set(cls: type, starts: list[str]) -> set[str]:
    """Attributes of `self` that some method reads and none sets."""
    return own(reached(cls, starts), ast.Load) - there(cls, starts) - set(NOT_REACHED)


def asked_of(nodes: Iterable[ast.AST], part: str) -> set[str]:
    """What is read on `self.part`."""
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == f"self.{part}"]
    return {node.attr for node in attributes} - set(NOT_REACHED)


def run_by_verl() -> list[str]:
    """The methods of a trainer that verl's TaskRunnerV1 calls, and its constructor."""
    return ["__init__", *asked_of(ast.walk(ast.parse(inspect.getsource(main_ppo))), "trainer")]


PARTS = {
    "agent_loop_manager": (AgentLoopManager,),
    "replay_buffer": (WatchedReplayBuffer,),
    "actor_rollout_wg": (RayWorkerGroup, TrainerRank),
    "reward_loop_manager": (RewardWorkers,),
}


def test_all_that_verls_loop_asks_of_our_trainer_is_there() -> None:
    assert {"init", "fit", "get_llm_client"} <= set(run_by_verl()) <= set(dir(OmniTrainer))
    assert not never_set(OmniTrainer, run_by_verl())


@pytest.mark.parametrize("part", PARTS)
def test_all_that_the_loop_asks_of_its_parts_is_there(part: str) -> None:
    asked = asked_of(reached(OmniTrainer, run_by_verl()), part)
    assert asked and not asked - {name for cls in PARTS[part] for name in there(cls, methods_of_mro(cls))}


def test_our_agent_loop_worker_takes_what_verl_makes_one_with() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(VerlAgentLoopManager._init_agent_loop_workers)))
    remote = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "remote"]
    assert [(len(call.args), call.keywords) for call in remote] == [(4, [])]
    inspect.signature(AgentLoopWorker).bind(*remote[0].args)


def test_verls_reward_worker_runs_our_manager(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    given = [f"model.path={random_checkpoint}", f"prompts={tmp_path / 'prompts.txt'}", "backend=verl"]
    config = verl_config(compose([*given, "reward=jpeg_compressibility"]))
    adopt(config)
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    prompt = Prompt(text="a cat")
    rows = DataProto.concat([to_score(cast(Any, SimpleNamespace(media=image, prompt=prompt))) for image in images])
    outputs = asyncio.run(RewardLoopWorker(config).compute_score_batch(rows))
    expected = WeightedSum({"jpeg_compressibility": 1.0})(list(images), [prompt] * 3)
    assert [output["reward_score"] for output in outputs] == expected.total
    manager = resolve_reward_manager_cls(config)
    assert manager.__name__ == RewardManager.__name__
    scores = manager.assemble_rm_scores(rows, expected.total)
    TensorDict({"rm_scores": scores}, batch_size=len(rows))  # as RewardLoopManager does
    assert scores[:, -1].tolist() == expected.total


def test_another_release_of_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.9.2")
    with pytest.raises(UserError, match=r"verl 0\.9\.2 is installed: expected 0\.9\.1"):
        runpy.run_path(str(ours.__file__))


class Changed:
    """What a release of verl might do to the methods that we override."""

    def nvtx_range(self, msg: str, color: str) -> None: ...

    async def launch_servers(self, resource_pool: Any) -> None: ...

    def run_single(self, data: Any) -> None: ...

    def _wait_for_next_poll(self, partition_id: str) -> float: ...

    def on_step_begin(self) -> None:
        self.made_by_verls_setup.run()  # type: ignore[attr-defined]

    def on_train_begin(self) -> None:
        self.agent_loop_manager.prefetch()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (CpuPlatform, "nvtx_range"),
        (Replica, "launch_servers"),
        (RewardManager, "run_single"),
        (WatchedReplayBuffer, "_wait_for_next_poll"),
    ],
)
def test_a_changed_signature_is_seen(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> None:
    monkeypatch.setattr(BASES[cls], name, vars(Changed)[name])
    assert [line for line in mismatches(cls, BASES[cls]) if f".{name}" in line]


def test_a_renamed_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ReplayBuffer, "_wait_for_next_poll")
    with pytest.raises(AssertionError, match="_wait_for_next_poll"):
        test_every_method_is_an_override_or_called_by_us(WatchedReplayBuffer)


def test_a_new_part_of_the_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOTrainer, "on_step_begin", Changed.on_step_begin)
    assert never_set(OmniTrainer, run_by_verl()) == {"made_by_verls_setup"}
    monkeypatch.setattr(PPOTrainer, "on_train_begin", Changed.on_train_begin)
    with pytest.raises(AssertionError, match="prefetch"):
        test_all_that_the_loop_asks_of_its_parts_is_there("agent_loop_manager")
