"""TrainConfig -> verl's configuration -> verl's run_ppo, unmodified."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from ray.exceptions import RayTaskError
from verl.plugin.platform import PlatformRegistry, get_platform

from omni_rollout import plugins
from omni_rollout.config import TrainConfig
from omni_rollout.diffusion.machine import WORKSPACE
from omni_rollout.errors import RunFailedError, UserError
from omni_rollout.integrations.verl import NAME
from omni_rollout.integrations.verl.deaths import DEATHS, cause_of, describe, note_restart
from omni_rollout.integrations.verl.records import to_section
from omni_rollout.run.checkpoints import how_to_go_on
from omni_rollout.run.start import find_start
from omni_rollout.run.stop import StopFlag

CONFIG_DIR = Path(__file__).parent / "config"
CONFIG_NAME = "omni_rollout_trainer"
PASSED_ON = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "WANDB_MODE", WORKSPACE)


def train(config: TrainConfig) -> None:
    """Runs steps up to `config.trainer.steps` on Ray; what it makes lies in `config.run_dir`, as with backend=embedded.

    When a process dies that cannot be replaced in place, all of them are started again, `launch.max_restarts` times, from the
    newest checkpoint.

    Raises:
        UserError: what verl's plug-in loader kept to itself, or what a process found wrong with the configuration.
        RunFailedError: the last checkpoint could not be written, or one process too many died.
    """
    check_platform()
    config = _for_every_process(config)
    stop = StopFlag(config.run_dir)
    stop.clear()
    with stop.signals():
        for restart in range(config.launch.max_restarts + 1):
            start = find_start(config)
            if start.run is not None and start.step >= config.trainer.steps:
                print(f"all {config.trainer.steps} steps are done: {start.checkpoint}")
                return
            try:
                _run(_with_resume(config, str(start.checkpoint)) if start.checkpoint is not None else config, stop)
                return
            except DEATHS as error:
                what = describe(error)
                if stop.is_set or restart == config.launch.max_restarts:
                    raise RunFailedError(f"a process of the run died: {what}; {how_to_go_on(config.run_dir)}") from error
                note_restart(config.run_dir, what)
                config = _with_resume(config, "auto")
                print(f"a process of the run died: {what}; restart {restart + 1} of {config.launch.max_restarts}", flush=True)


def _run(config: TrainConfig, stop: StopFlag) -> None:
    from verl.trainer.main_ppo import run_ppo

    try:
        run_ppo(verl_config(config), task_runner_class=_Runner(stop))
    except RayTaskError as error:
        cause = cause_of(error)
        if isinstance(cause, (UserError, RunFailedError, *DEATHS)):
            raise cause from error
        raise
    finally:
        ray.shutdown()
        stop.idle()


class _Runner:
    """What run_ppo asks for a task runner once Ray has started, and has taken SIGTERM for itself."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop

    def remote(self) -> Any:
        from verl.trainer.main_ppo import TaskRunnerV1

        self._stop.listen()
        return cast(Any, TaskRunnerV1).remote()


def _with_resume(config: TrainConfig, resume: str) -> TrainConfig:
    return replace(config, trainer=replace(config.trainer, resume=resume))


def check_platform() -> None:
    """Raises UserError where verl did not load this package's plug-in: it says nothing when one fails."""
    found = PlatformRegistry.get("cpu")
    if found is None or found.__module__ != f"{__package__}.platform":  # not by importing it: that would register it
        raise UserError(
            "verl did not load the plug-in omni_rollout_cpu (entry point verl.plugins): install this package again, and see "
            "that VERL_USE_EXTERNAL_PLUGINS is auto, or names it"
        )


def verl_config(config: TrainConfig) -> DictConfig:
    """verl's groups, with ours over them, every key resolved: run_ppo hands some of them to Ray as they are."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        composed = compose(CONFIG_NAME, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", f"{NAME}={{}}"])
    platform = os.environ.get("VERL_PLATFORM") or get_platform().device_name
    with open_dict(composed):
        composed[NAME] = to_section(config)
        composed.trainer.device = platform
        start: Any = composed.ray_kwargs.ray_init
        start.runtime_env.env_vars = {
            **start.runtime_env.env_vars,
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            # Decided here, once: an actor without a GPU of its own would take a machine that has some for a CPU.
            **({"VERL_PLATFORM": platform} if platform == "cpu" else {}),
        }
        if config.launch.address is not None:
            start.pop("num_cpus")
            start.address = config.launch.address
        else:
            start.address = "local"  # without, Ray joins a cluster that somebody else started on this machine
            start.num_cpus = config.launch.cpus
            start.object_store_memory = config.launch.object_store_mb << 20
    OmegaConf.resolve(composed)
    return composed


def _for_every_process(config: TrainConfig) -> TrainConfig:
    """Absolute paths, and a number of threads that does not depend on what Ray sets for a worker."""

    def absolute(path: str) -> str:
        """Of a file, a folder, or a function of a file; modules and addresses stay as they are."""
        is_path = not plugins.is_address(path) and (".py:" in path or not plugins.is_function(path))
        return str(Path(path).absolute()) if is_path else path

    prompts: Any = config.prompts
    prompts = {absolute(one): weight for one, weight in prompts.items()} if isinstance(prompts, dict) else absolute(prompts)
    reward = replace(config.reward, source={name: absolute(source) for name, source in config.reward.source.items()})
    model, evaluation = config.model, config.evaluation
    if Path(model.path).is_dir():
        model = replace(model, path=absolute(model.path))
    if evaluation.prompts is not None:
        evaluation = replace(evaluation, prompts=absolute(evaluation.prompts))
    return replace(
        config,
        model=model,
        evaluation=evaluation,
        prompts=prompts,
        reward=reward,
        run_dir=absolute(config.run_dir),
        threads=config.threads if config.threads is not None else torch.get_num_threads(),
    )
