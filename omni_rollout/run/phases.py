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

    def __init__(self, config: TrainConfig, engine: Engine, learner: Learner) -> None:
        folder, offload = Path(config.run_dir), config.trainer.offload
        self._parts: list[tuple[set[Phase], Leaves]] = []  # where each is here
        if isinstance(engine, RolloutEngine):
            self._parts.append(({Phase.rollout, Phase.sync, Phase.save}, _GivenBack(engine, learner)))
            if config.rollout.offload is RolloutOffload.encoders:
                self._parts.append(({Phase.rollout}, Stowed(engine.beside_policy, folder, constant=True)))
        if config.trainer.engine is not TrainerEngineName.torch:
            return  # the others offload by themselves
        if offload is not Offload.none:
            self._parts.append(({Phase.update, Phase.save}, Stowed(learner.moments, folder)))
        if offload is Offload.all:
            here = {Phase.update, Phase.sync, Phase.save}
            self._parts += [(here, Stowed(learner.frozen, folder, constant=True)), (here, Stowed(learner.learned, folder))]

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
