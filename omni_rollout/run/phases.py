"""What of a process that holds an engine and a trainer lies on the device in which phase of a step.

                               rollout  update  sync  save
text encoder, VAE                 x       (x)    (x)   (x)    not with rollout.offload=encoders
the engine's own weights          x              x     x      given back: the sync makes them anew
AdamW's moments                  (x)      x     (x)    x      not with trainer.offload=optimizer|all
the trainer's own weights        (x)      x      x     x      not with trainer.offload=all; its other policies too

Weights that both sides share stay. No bit of a step is another for what leaves and comes back.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Protocol

from omni_rollout.config import Offload, RolloutOffload, TrainConfig, TrainerEngineName
from omni_rollout.models.base.stowed import Stowed
from omni_rollout.policy.learner import Learner
from omni_rollout.rollout.choice import Engine
from omni_rollout.rollout.engine import RolloutEngine


class Phase(Enum):
    rollout = "rollout"
    update = "update"  # and log-probs that the trainer computes before it
    sync = "sync"
    save = "save"


class Leaves(Protocol):
    def leave(self) -> None: ...

    def come_back(self) -> None: ...


class Phases:
    """Begins with everything here."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._config, self._engine, self._folder = config, engine, Path(config.run_dir)
        self._parts: list[tuple[set[Phase], Leaves]] = []  # where each is here
        if isinstance(engine, RolloutEngine) and config.rollout.offload is RolloutOffload.encoders:
            self._parts.append(({Phase.rollout}, Stowed(engine.beside_policy, self._folder, constant=True)))

    def add(self, learner: Learner) -> None:
        """Once there is one: it is loaded in `sync`, with what a rollout alone needs away."""
        if isinstance(self._engine, RolloutEngine):
            self._parts.append(({Phase.rollout, Phase.sync, Phase.save}, _GivenBack(self._engine, learner)))
        offload = self._config.trainer.offload
        if self._config.trainer.engine is not TrainerEngineName.torch or offload is Offload.none:
            return  # the others offload by themselves
        self._parts.append(({Phase.update, Phase.save}, Stowed(learner.moments, self._folder)))
        if offload is Offload.all:
            here = {Phase.update, Phase.sync, Phase.save}
            frozen, learned = Stowed(learner.frozen, self._folder, constant=True), Stowed(learner.learned, self._folder)
            self._parts += [(here, frozen), (here, learned)]

    def enter(self, phase: Phase) -> None:
        """What is not needed leaves first, then what is comes back."""
        for here, part in self._parts:
            if phase not in here:
                part.leave()
        for here, part in self._parts:
            if phase in here:
                part.come_back()


class _GivenBack:
    """The engine's weights that the trainer does not share: a sync makes them anew, so nothing of them is kept."""

    def __init__(self, engine: RolloutEngine, learner: Learner) -> None:
        self._engine, self._learner = engine, learner

    def leave(self) -> None:
        self._engine.give_back(self._learner.shared.keys())

    def come_back(self) -> None:
        pass
