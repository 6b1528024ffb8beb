"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from omni_rollout.errors import UserError


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * parameter, in the parameters' dtype and on their device."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"ema_decay={decay}: expected a number between 0 and 1, such as 0.95")
        self._parameters = list(parameters)
        self._decay = decay
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter, 1 - self._decay)

    @torch.no_grad()
    def restart(self) -> None:
        """The average becomes what the parameters are now."""
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.copy_(parameter)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the average inside, and bit for bit themselves again after, whatever happens inside."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
