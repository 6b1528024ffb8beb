"""The base of errors that are written for people: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, what was expected and what to do."""


class PinnedKnobError(UserError):
    """The exact profile cannot be had as things are set here."""
