"""One command of `omni-rollout` a file: its options, and what it does with them. Nothing heavy is imported before it runs.

Each has `add(commands)`, which adds it to the parser of the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType

ORDER = ("train", "rollout", "parity", "replay", "plan", "nano", "reward", "doctor")  # as `--help` lists them
Commands = argparse._SubParsersAction  # argparse has no public name for what `add_subparsers` returns


def modules() -> Iterator[ModuleType]:
    yield from (import_module(f"{__name__}.{name}") for name in ORDER)


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """A command whose exit status is what `run` returns; options are added to the parser that comes back."""
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    return command
