"""The engine that a run samples with: in this process, or at `rollout.url`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from omni_rollout.config import AUTO, TrainConfig
from omni_rollout.errors import UserError
from omni_rollout.launch.progress import Progress
from omni_rollout.rollout import in_flight
from omni_rollout.rollout.adapter import Adapter
from omni_rollout.rollout.engine import RolloutEngine
from omni_rollout.rollout.remote import RemoteEngine
from omni_rollout.rollout.several import RemoteEngines

Engine = RolloutEngine | RemoteEngine | RemoteEngines


def open_engine(config: TrainConfig, progress: Progress) -> Engine:
    """Raises UserError: nobody answers at `rollout.url`, or with another model than the run's."""
    url = config.rollout.url
    progress.stage("loading the model into the engine" if url is None else f"asking {url}")
    return make_engine(config, progress) if url is None else _remote(config)


def give(engine: Engine, named: Iterable[tuple[str, torch.Tensor]], version: int, adapter: Callable[[], Adapter | None]) -> str:
    """`update_weights` of an engine; one elsewhere is sent the adapter that they were merged from, where there is one."""
    if isinstance(engine, RolloutEngine):
        return engine.update_weights(named, version)
    return engine.update_weights(named, version, adapter())


def held_here(engine: Engine) -> dict[str, torch.Tensor]:
    """The policy's weights that lie in this process, by checkpoint name; of a server: none."""
    return engine.policy_tensors() if isinstance(engine, RolloutEngine) else {}


def make_engine(config: TrainConfig, progress: Progress | None = None) -> RolloutEngine:
    """In this process, whatever `rollout.url` says; `progress` is told what `rollout.max_num_seqs=auto` found."""
    asked = config.rollout.max_num_seqs
    engine = RolloutEngine(
        config.model.path,
        family=config.model.family,
        dtype=config.model.dtype.value,
        max_num_seqs=in_flight.MOST if asked == AUTO else asked,
        parity=config.parity.value,
    )
    if asked == AUTO:
        try:
            found = in_flight.calibrate(engine, config)
        except BaseException:
            engine.close()
            raise
        if progress is not None:
            progress.say(in_flight.told(found))
    return engine


def _remote(config: TrainConfig) -> RemoteEngine | RemoteEngines:
    """The engine at `rollout.url`.

    Raises:
        UserError: nobody answers there, or its model is another than the run's.
    """
    assert config.rollout.url is not None
    urls = config.rollout.url.split(",")
    more = config.rollout.max_num_seqs
    engine = RemoteEngine(urls[0]) if len(urls) == 1 else RemoteEngines(urls, max_num_seqs=more)
    here = {"family": config.model.family, "dtype": config.model.dtype.value, "parity": config.parity.value}
    if wrong := [f"{name} {engine.about[name]}, here {value}" for name, value in here.items() if engine.about[name] != value]:
        engine.close()
        raise UserError(
            f"rollout.url={config.rollout.url}: it serves {'; '.join(wrong)}; start it with the run's model and parity"
        )
    return engine
