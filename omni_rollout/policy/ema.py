"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from omni_rollout.errors import UserError
from omni_rollout.policy.trainer_engines import TrainerEngine


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * parameter, of the parts that this rank holds, where the engine holds them.

    Args:
        decay: None: each `update` says its own.
    """

    def __init__(self, engine: TrainerEngine, decay: float | None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"ema_decay={decay}: expected a number between 0 and 1, such as 0.95")
        self._engine = engine
        self._decay = decay
        self.parts = _copies(engine)  # by parameter name

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        decay = self._decay if decay is None else decay
        assert decay is not None
        for name, part in self._engine.parts().items():
            self.parts[name].lerp_(part, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """The average becomes what the parameters are now."""
        for name, part in self._engine.parts().items():
            self.parts[name].copy_(part)

    @torch.no_grad()
    def load(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Takes the average from whole tensors, those that `Learner.average_state` gave.

        Raises:
            UserError: a parameter is missing, or has another shape.
        """
        for name, part in self.parts.items():
            if name not in whole:
                raise UserError(f"the average has no {name}: it was saved for another set of trainable parameters")
            part.copy_(self._engine.part(name, whole[name]))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the average inside, and bit for bit themselves again after, whatever happens inside."""
        own = _copies(self._engine)
        self._write(self.parts)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, part in self._engine.parts().items():
            part.copy_(values[name])


def _copies(engine: TrainerEngine) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in engine.parts().items()}
