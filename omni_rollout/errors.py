"""The base of errors that are written for people: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, what was expected and what to do."""


class PinnedKnobError(UserError):
    """The exact profile cannot be had as things are set here."""


class RunFailedError(RuntimeError):
    """A run that ended for a reason of its machine, not of what it was given: shown as one line, exit status 1."""


class EngineDiedError(RuntimeError):
    """vllm-omni's thread in this process has ended; what was in flight is lost."""


class EngineHungError(RunFailedError):
    """vllm-omni's thread in this process gives no more images, and cannot be ended: the process must be."""


class WeightSyncError(RuntimeError):
    """The engine does not hold the weights it was given."""
