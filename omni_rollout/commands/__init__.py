"""One command of `omni-rollout` a file: its options, and what it does with them. Nothing heavy is imported before it runs.

Each has `add(commands)`, which adds it to the parser of the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType

from omni_rollout.errors import UserError

ORDER = (
    "train",
    "rollout",
    "serve",
    "evaluate",
    "report",
    "export",
    "parity",
    "replay",
    "plan",
    "nano",
    "reward",
    "doctor",
)  # of --help
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


def own_words(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """The words that are this command's and no key of the configuration: `name=value` -> value, and the rest of the words.

    Raises:
        UserError: one is given twice, or without a value.
    """
    found: dict[str, str | None] = dict.fromkeys(names)
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in found or not equals:
            rest.append(word)
        elif not value:
            raise UserError(f"{name} has no value: give {name}=...")
        elif found[name] is not None:
            raise UserError(f"{name} is given twice, as {found[name]} and {value}: give it once")
        else:
            found[name] = value
    return found, rest
